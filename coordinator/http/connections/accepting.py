"""Takes connections from the listening socket: a few in each pass of the loop, never too many.

The loop's own server accepts until nobody waits, in one pass, and stops in silence when the process
has no file numbers left.
"""

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from coordinator.http.connections.kept import Connections

TURN_S = 0.005  # of a pass: whoever waits here could be somebody who asks how we are
MAX_OPENING = 16  # in a pass: each is made into a connection in the next one, all of them together
PAUSE_S = 0.1  # when the system has no room for another connection
_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_BODY = (
    b'{"error":{"message":"too many connections are open","type":"server_error","param":null,'
    b'"code":"too_many_connections"}}'
)
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)

_log = logging.getLogger(__name__)


class Acceptor:
    """Stands in for an ``asyncio.Server``.

    Args:
        listener: non-blocking, listening; closed by whoever opened it.
        make_protocol: for each connection.
        connections: how many there may be.
    """

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        connections: Connections,  # type: ignore[type-arg]  # of whatever the protocol is
    ) -> None:
        self._listener = listener
        self._make_protocol = make_protocol
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._is_closed = False

    def start(self) -> None:
        """Accept from now on."""
        self._pause = None
        if not self._is_closed:
            self._loop.add_reader(self._listener, self._accept_some)

    def close(self) -> None:
        """Accept no more. Idempotent."""
        self._is_closed = True
        if self._pause is not None:
            self._pause.cancel()
        elif self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)

    async def wait_closed(self) -> None:
        """Wait for what is being opened."""
        if self._opening:
            await asyncio.wait(self._opening)

    def _accept_some(self) -> None:
        until = time.monotonic() + TURN_S
        while time.monotonic() < until and len(self._opening) < MAX_OPENING:
            room = self._connections.num_free + self._connections.num_idle
            if self._opening and room <= len(self._opening):
                return  # one of those may be idle, and go, in the next pass
            try:
                accepted, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:  # gone before it was accepted
                continue
            except OSError as error:
                self._wait_for_room(error)
                return
            if self._connections.admit(len(self._opening)):
                task = self._loop.create_task(self._open(accepted))
                self._opening.add(task)
                task.add_done_callback(self._opening.discard)
            else:
                _log.warning(
                    "a connection was refused: %d are open, and all are at work",
                    len(self._connections),
                )
                _refuse(accepted)

    def _wait_for_room(self, error: OSError) -> None:
        """The connection stays in the kernel's queue, which would be reported in every pass."""
        self._connections.num_accept_errors += 1
        _log.error("no connection can be accepted now: %s", error.strerror)
        if error.errno in _PASSING:
            self._connections.make_room()
        self._loop.remove_reader(self._listener)
        self._pause = self._loop.call_later(PAUSE_S, self.start)

    async def _open(self, accepted: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, accepted)
        except OSError as error:  # gone already
            accepted.close()
            _log.debug("a connection was not opened: %s", error)


def _refuse(accepted: socket.socket) -> None:
    """Say so and close, without waiting for anything."""
    with accepted, suppress(OSError):
        accepted.setblocking(False)
        accepted.send(_REFUSAL)
        accepted.shutdown(socket.SHUT_WR)
