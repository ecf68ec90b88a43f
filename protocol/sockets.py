"""The only file that opens ZMQ sockets; every option that matters is set on purpose.

- Mandatory routing: a ROUTER raises for an unknown peer where the default drops in silence.
- High-water marks and a maximal message size bound the memory that a peer can fill.
- ZMTP heartbeats notice a dead connection, and a process that is stopped: libzmq's own threads ask
  and answer them, whatever the process's other threads do or hold, the GIL included. They do not
  notice a process that hangs; the application's own heartbeats do.
- Linger zero: a process that ends does not wait for a peer that will never read.
- CurveZMQ encrypts every connection and proves both ends. The key pair of all bound sockets is made
  from the cluster's token, and neither half is ever sent in clear. So a client that has the public
  key knows the token, and a server that can answer has the secret key. A stranger does not get past
  the handshake, which libzmq's own threads do; a ZAP handler would need the GIL.

A ROUTER here is bound, a DEALER connects; a DEALER's routing id names its process and incarnation.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import zmq
import zmq.asyncio
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from protocol.errors import ConfigError, PeerError
from protocol.proof import prove

MAX_MESSAGE_BYTES = 64 << 20
HIGH_WATER_MARK = 10_000
# Of one rank, unread by the coordinator. libzmq stops reading a connection whose queue is full, its
# heartbeats too, so that a coordinator which is busy for a minute would look dead to a pool that
# makes some hundred steps per second.
CONTROL_HIGH_WATER_MARK = 200_000
HEARTBEAT_INTERVAL_MS = 1_000
HEARTBEAT_TIMEOUT_MS = 5_000


_AnySocket = zmq.Socket[bytes] | zmq.asyncio.Socket
C = TypeVar("C", zmq.Context[zmq.Socket[bytes]], zmq.asyncio.Context)


def _keyed(context: C, token: str) -> C:
    """Give the context's sockets the keys that are made from the token."""
    if not zmq.has("curve"):
        raise ConfigError("this pyzmq is built without CURVE: install one of its wheels")
    secret = z85.encode(prove(token, "baton 3 sockets"))
    public = zmq.curve_public(secret)
    context.setsockopt(zmq.CURVE_SECRETKEY, secret)
    context.setsockopt(zmq.CURVE_PUBLICKEY, public)
    context.setsockopt(zmq.CURVE_SERVERKEY, public)
    return context


def _configure(socket: _AnySocket) -> None:
    # pyzmq passes over a context's option that a socket does not take.
    assert socket.getsockopt(zmq.MECHANISM) == zmq.CURVE, "the context has no keys"
    if socket.getsockopt(zmq.TYPE) == zmq.ROUTER:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HEARTBEAT_TIMEOUT_MS)


def _bind(socket: _AnySocket, address: str) -> str:
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        raise ConfigError(f"cannot listen on {address}: {error.strerror}") from error
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def _file_number(address: str) -> int | None:
    """The inode of an ``ipc`` address; None for every other, and when the file is gone."""
    if not address.startswith("ipc://"):
        return None
    try:
        return Path(address.removeprefix("ipc://")).stat().st_ino
    except FileNotFoundError:
        return None


class Router:
    """A bound ROUTER: receives from anyone, sends to those that have spoken. For one thread.

    Args:
        context: the process's ZMQ context.
        address: ``ipc://PATH``, or ``tcp://HOST:*`` for a free port.
        hands_over: a second connection under a routing id takes the place of the first; by default
            it is ignored for good, even after the first has turned out to be dead.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        *,
        hands_over: bool = False,
    ) -> None:
        self.socket = context.socket(zmq.ROUTER)
        _configure(self.socket)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, hands_over)
        self.address = _bind(self.socket, address)

    def receive(self) -> tuple[str, bytes] | None:
        """The next (routing id, frame), or None when there is none now. Odd frames are skipped."""
        while True:
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            if len(parts) == 2:
                return parts[0].decode("utf-8", "replace"), parts[1]

    def send(self, peer: str, frame: bytes) -> None:
        """Send without blocking.

        Raises:
            PeerError: the peer is gone, or reads so slowly that its queue is full.
        """
        try:
            self.socket.send_multipart([peer.encode(), frame], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise PeerError(f"cannot send to {peer}: {error.strerror}") from error

    def close(self) -> None:
        self.socket.close()


@dataclass(frozen=True, slots=True)
class Pulse:
    """How a connection is watched: it is probed every ``interval_s``, and is down when no byte has
    come for ``timeout_s`` after a probe."""

    interval_s: float
    timeout_s: float


class Dealer:
    """A DEALER connected to one ROUTER. For one thread.

    Args:
        context: the process's ZMQ context.
        address: the ROUTER's.
        routing_id: under which it knows us.
        pulse: watch the connection, for :attr:`is_up`.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        routing_id: str,
        pulse: Pulse | None = None,
    ) -> None:
        self.socket = context.socket(zmq.DEALER)
        _configure(self.socket)
        self.socket.setsockopt_string(zmq.IDENTITY, routing_id)
        self._monitor: zmq.Socket[bytes] | None = None
        self._is_up = False
        if pulse is not None:
            self.socket.setsockopt(zmq.HEARTBEAT_IVL, math.ceil(pulse.interval_s * 1000))
            self.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, math.ceil(pulse.timeout_s * 1000))
            # TCP alone would try a link that was cut for long ever more rarely.
            self.socket.setsockopt(zmq.CONNECT_TIMEOUT, math.ceil(pulse.timeout_s * 1000))
            events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
            self._monitor = self.socket.get_monitor_socket(events)
        self.socket.connect(address)
        self.address = address

    @property
    def is_up(self) -> bool:
        """Whether the connection stands, of a dealer with a pulse.

        The other end then lives, but it may hang.
        """
        assert self._monitor is not None, "only with a pulse"
        with contextlib.suppress(zmq.Again):
            while True:
                event = recv_monitor_message(self._monitor, zmq.NOBLOCK)["event"]
                self._is_up = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
        return self._is_up

    def receive(self) -> bytes | None:
        """The next frame, or None when there is none now."""
        try:
            return bytes(self.socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None

    def send(self, frame: bytes) -> None:
        """Send without blocking.

        Raises:
            PeerError: the peer has not read for so long that the queue is full.
        """
        try:
            self.socket.send(frame, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise PeerError(f"cannot send to {self.address}: {error.strerror}") from error

    def close(self) -> None:
        if self._monitor is not None:
            self.socket.disable_monitor()
            self._monitor.close()
        self.socket.close()


class AsyncRouter:
    """The coordinator's ROUTER, in its event loop."""

    def __init__(self, context: zmq.asyncio.Context, address: str) -> None:
        self._socket = context.socket(zmq.ROUTER)
        # The asyncio socket shares the options; only its send and receive are coroutines.
        _configure(self._socket)
        self._socket.setsockopt(zmq.RCVHWM, CONTROL_HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A rank that has seen the end of its connection before we have comes back under its name.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.address = _bind(self._socket, address)
        self._file = _file_number(self.address)

    @property
    def is_displaced(self) -> bool:
        """Whether another process listens at our address now. Only a file can be taken over so."""
        return _file_number(self.address) not in (None, self._file)

    async def receive(self) -> tuple[str, bytes]:
        """The next (routing id, frame)."""
        while True:
            parts = await self._socket.recv_multipart()
            if len(parts) == 2:
                return parts[0].decode("utf-8", "replace"), parts[1]

    async def send(self, peer: str, frame: bytes) -> None:
        """Send one frame.

        Raises:
            PeerError: the peer is gone, or its queue is full.
        """
        try:
            await self._socket.send_multipart([peer.encode(), frame], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise PeerError(f"cannot send to {peer}: {error.strerror}") from error

    def close(self) -> None:
        self._socket.close()


class Waker:
    """Wakes a thread that waits in a :class:`Poller`, from any other thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], name: str) -> None:
        self.socket = context.socket(zmq.PULL)
        self.socket.bind(f"inproc://{name}")
        self._context = context
        self._name = name

    def handle(self) -> "WakerHandle":
        """A handle for one other thread."""
        return WakerHandle(self._context, self._name)

    def drain(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                self.socket.recv(zmq.NOBLOCK)

    def close(self) -> None:
        self.socket.close()


class WakerHandle:
    """The other end of a :class:`Waker`; belongs to the thread that uses it."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], name: str) -> None:
        self._socket = context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(f"inproc://{name}")

    def wake(self) -> None:
        with contextlib.suppress(zmq.Again):  # a full queue will wake it as well
            self._socket.send(b"", zmq.NOBLOCK)

    def close(self) -> None:
        self._socket.close()


class Poller:
    """Waits for any of several sockets to have something to receive."""

    def __init__(self, *members: Router | Dealer | Waker) -> None:
        self._poller = zmq.Poller()
        for member in members:
            self.add(member)

    def add(self, member: Router | Dealer | Waker) -> None:
        self._poller.register(member.socket, zmq.POLLIN)

    def remove(self, member: Router | Dealer | Waker) -> None:
        self._poller.unregister(member.socket)

    def wait(self, timeout_s: float) -> bool:
        """Wait until something has arrived, or ``timeout_s`` are over; whether something has.

        The time is rounded up to milliseconds: rounded down, a caller whose deadline is less than
        one away would spin until then.
        """
        return bool(self._poller.poll(max(0, math.ceil(timeout_s * 1000))))


@contextlib.contextmanager
def open_context(token: str) -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    """The process's ZMQ context; on leaving, its sockets are closed without lingering.

    Args:
        token: the cluster's; processes with another one cannot connect.

    Raises:
        ConfigError: pyzmq cannot encrypt here.
    """
    context = _keyed(zmq.Context(), token)
    try:
        yield context
    finally:
        context.destroy(linger=0)


@contextlib.contextmanager
def open_async_context(token: str) -> Iterator[zmq.asyncio.Context]:
    """The same, for an event loop."""
    context = _keyed(zmq.asyncio.Context(), token)
    try:
        yield context
    finally:
        context.destroy(linger=0)
