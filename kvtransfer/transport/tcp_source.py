"""The source's side of TCP reads: it serves bytes of its pool to readers that know the token.

The life of a connection
1. accepted and sent a nonce; closed when no right proof comes in time;
2. a request is read to its end, and every run of it is checked against the pool;
3. its bytes go out straight from the pool; the next request is not looked at before they are gone,
   so a reader that does not read holds one request and nothing more.
"""

import contextlib
import hmac
import logging
import secrets
import selectors
import socket
import time

import numpy as np

from kvtransfer.transport.tcp_wire import (
    COUNT,
    HANDSHAKE_TIMEOUT_S,
    MAX_RUNS,
    NONCE_BYTES,
    RUN,
    Cursor,
    prove_end,
)
from protocol.errors import TransferError
from protocol.proof import PROOF_BYTES

_log = logging.getLogger(__name__)

_MAX_CONNECTIONS = 1024
_MAX_STRANGERS = 64  # connections that have not proved themselves
_RECEIVE_BYTES = 64 << 10
_CALLS_PER_TURN = 8  # system calls that one connection gets before the others have their turn


class _Connection:
    def __init__(self, channel: socket.socket, nonce: bytes, deadline: float) -> None:
        self.channel = channel
        self.nonce = nonce
        self.deadline = deadline  # for the proof
        self.is_known = False
        self.received = bytearray()
        self.sending: Cursor | None = None


class TcpSource:
    """Listens, and serves reads of one memory. Driven by its owner's selector.

    Args:
        incarnation: this rank's, which a reader's proof must name.
        token: the cluster's secret.
        memory: the bytes that may be read, all of them.
        host: the address to listen on.

    Raises:
        TransferError: the address cannot be bound.
    """

    def __init__(self, incarnation: str, token: str, memory: memoryview, host: str) -> None:
        self._incarnation = incarnation
        self._token = token
        self._memory = memory
        self._selector = selectors.DefaultSelector()
        self._connections: set[_Connection] = set()
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, 0), family=family, backlog=128)
        except OSError as error:
            raise TransferError(f"cannot listen on {host}: {error}") from error
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]

    def progress(self) -> None:
        """Accept, read requests and send bytes, as far as goes without waiting."""
        for key, _ in self._selector.select(0):
            if key.fileobj is self._listener:
                self._accept()
            else:
                self._serve(key.data)
        now = time.monotonic()
        for connection in [c for c in self._connections if not c.is_known and c.deadline < now]:
            self._drop(connection, "no proof in time")

    def close(self) -> None:
        """Stop serving. Idempotent."""
        for connection in list(self._connections):
            self._drop(connection, "closing")
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        try:
            channel, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        strangers = sum(not connection.is_known for connection in self._connections)
        if len(self._connections) >= _MAX_CONNECTIONS or strangers >= _MAX_STRANGERS:
            channel.close()
            return
        channel.setblocking(False)
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        nonce = secrets.token_bytes(NONCE_BYTES)
        connection = _Connection(channel, nonce, time.monotonic() + HANDSHAKE_TIMEOUT_S)
        self._connections.add(connection)
        self._selector.register(channel, selectors.EVENT_READ, connection)
        with contextlib.suppress(OSError):  # an empty buffer takes it; a dead peer shows on reading
            channel.send(nonce)

    def _serve(self, connection: _Connection) -> None:
        try:
            for _ in range(_CALLS_PER_TURN):
                if connection.sending is not None:
                    self._send(connection)
                else:
                    self._receive(connection)
        except BlockingIOError:
            pass
        except (OSError, TransferError) as error:
            self._drop(connection, str(error))

    def _receive(self, connection: _Connection) -> None:
        piece = connection.channel.recv(_RECEIVE_BYTES)
        if not piece:
            raise TransferError("closed by the reader")
        connection.received += piece
        self._parse(connection)

    def _parse(self, connection: _Connection) -> None:
        received = connection.received
        if not connection.is_known:
            if len(received) < NONCE_BYTES + PROOF_BYTES:
                return
            self._admit(connection)
        if len(received) < COUNT.size:
            return
        (count,) = COUNT.unpack_from(received)
        if not 0 < count <= MAX_RUNS:
            raise TransferError(f"a request of {count} runs")
        end = COUNT.size + count * RUN.size
        if len(received) < end:
            return
        connection.sending = Cursor(self._memory, self._spans(received[COUNT.size : end]))
        del received[:end]
        self._selector.modify(connection.channel, selectors.EVENT_WRITE, connection)

    def _admit(self, connection: _Connection) -> None:
        received = connection.received
        theirs = bytes(received[:NONCE_BYTES])
        end = NONCE_BYTES + PROOF_BYTES
        about = (self._incarnation, connection.nonce, theirs)
        proof = prove_end(self._token, "reader", *about)
        if not hmac.compare_digest(proof, bytes(received[NONCE_BYTES:end])):
            raise TransferError("wrong proof")
        connection.is_known = True
        del received[:end]
        # Only the nonce was sent before: an empty buffer takes it whole.
        own = prove_end(self._token, "source", *about)
        if connection.channel.send(own) != len(own):
            raise TransferError("the reader takes nothing")

    def _spans(self, request: bytearray) -> list[tuple[int, int]]:
        runs = np.frombuffer(request, dtype="<u8").reshape(-1, 2)
        total = np.uint64(len(self._memory))
        offsets, sizes = runs[:, 0], runs[:, 1]
        # Unsigned: total - offset is only taken where it cannot wrap.
        if (sizes == 0).any() or (offsets > total).any() or (sizes > total - offsets).any():
            raise TransferError("a request outside the pool")
        return list(zip(offsets.tolist(), sizes.tolist(), strict=True))

    def _send(self, connection: _Connection) -> None:
        cursor = connection.sending
        assert cursor is not None
        cursor.advance(connection.channel.sendmsg(cursor.views()))
        if cursor.is_done:
            connection.sending = None
            self._selector.modify(connection.channel, selectors.EVENT_READ, connection)
            self._parse(connection)  # the next request may be here already

    def _drop(self, connection: _Connection, reason: str) -> None:
        _log.debug("dropping a reader: %s", reason)
        self._connections.discard(connection)
        self._selector.unregister(connection.channel)
        connection.channel.close()
