"""KV over plain TCP: runs everywhere, for pools in host memory.

The life of a read
1. ``connect`` opens one connection per peer; the handshake is finished by ``progress``;
2. ``read`` queues a request and remembers where its bytes go;
3. ``progress`` sends requests and receives bytes straight into the pool, in the order asked;
4. a connection that ends fails what it still owed, at once: only this side writes to this memory.
"""

import hmac
import logging
import secrets
import selectors
import socket
import time
from collections import deque
from collections.abc import Sequence

import msgspec
import numpy as np

from kvcache.pool import KVPool
from kvtransfer.plan import ByteRun
from kvtransfer.transport.interface import KVTransport, ReadHandle, ReadState, check_runs
from kvtransfer.transport.tcp_source import TcpSource
from kvtransfer.transport.tcp_wire import (
    COUNT,
    HANDSHAKE_TIMEOUT_S,
    MAX_RUNS,
    NONCE_BYTES,
    Cursor,
    prove_end,
)
from protocol.errors import TransferError
from protocol.kv import RankEndpoint
from protocol.proof import PROOF_BYTES

_log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 2.0
_MAX_METADATA_BYTES = 512
_CALLS_PER_TURN = 8  # system calls that one peer gets before the others have their turn


class _Metadata(msgspec.Struct, frozen=True, array_like=True):
    host: str
    port: int


class _TcpRead(ReadHandle):
    def __init__(self, incarnation: str, runs: Sequence[ByteRun]) -> None:
        super().__init__(incarnation, runs)
        self.state = ReadState.IN_FLIGHT
        self.receiving: Cursor | None = None


class _Peer:
    """The reading end of a connection."""

    def __init__(self, channel: socket.socket, incarnation: str, num_bytes: int) -> None:
        self.channel = channel
        self.incarnation = incarnation
        self.num_bytes = num_bytes  # of its pool
        self.deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S  # for its proof
        self.nonce = b""
        self.own_nonce = secrets.token_bytes(NONCE_BYTES)
        self.proof = b""  # the source's, as far as it has come
        self.to_send = bytearray()  # requests
        self.reads: deque[_TcpRead] = deque()

    @property
    def is_proven(self) -> bool:
        """Whether the source has shown that it is one; what follows are bytes of its pool."""
        return len(self.proof) == PROOF_BYTES

    @property
    def is_ready(self) -> bool:
        """Whether the nonce is here and requests may follow the proof."""
        return len(self.nonce) == NONCE_BYTES


class TcpTransport(KVTransport):
    """One rank's reader and source.

    Args:
        incarnation: this rank's.
        token: the cluster's secret; a reader that does not know it is served nothing.
        host: the address to listen on, as other ranks can reach it.
    """

    name = "tcp"

    def __init__(self, incarnation: str, token: str, host: str = "127.0.0.1") -> None:
        self._incarnation = incarnation
        self._token = token
        self._host = host
        self._selector = selectors.DefaultSelector()
        self._peers: dict[str, _Peer] = {}
        self._source: TcpSource | None = None
        self._memory = memoryview(b"")

    def start(self, pool: KVPool) -> None:
        self._memory = pool.view()
        self._source = TcpSource(self._incarnation, self._token, self._memory, self._host)

    def metadata(self) -> bytes:
        assert self._source is not None, "start() comes first"
        return msgspec.msgpack.encode(_Metadata(*self._source.address))

    # -- peers -------------------------------------------------------------------------------------

    def connect(self, endpoint: RankEndpoint) -> None:
        incarnation = endpoint.incarnation
        if incarnation in self._peers:
            return
        address = self._decode(endpoint)
        try:
            channel = socket.create_connection(address, timeout=_CONNECT_TIMEOUT_S)
        except OSError as error:
            raise TransferError(f"cannot connect to {incarnation} at {address}: {error}") from error
        channel.setblocking(False)
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = _Peer(channel, incarnation, endpoint.layout.num_bytes)
        self._peers[incarnation] = peer
        self._selector.register(channel, selectors.EVENT_READ, peer)

    def disconnect(self, incarnation: str) -> None:
        peer = self._peers.get(incarnation)
        if peer is not None:
            self._drop(peer, "disconnected")

    def _decode(self, endpoint: RankEndpoint) -> tuple[str, int]:
        if endpoint.transport != self.name:
            raise TransferError(f"rank {endpoint.rank} speaks {endpoint.transport}, this one tcp")
        if len(endpoint.agent_metadata) > _MAX_METADATA_BYTES:
            raise TransferError(f"{endpoint.incarnation}: TCP metadata is too long")
        try:
            metadata = msgspec.msgpack.decode(endpoint.agent_metadata, type=_Metadata)
        except msgspec.DecodeError as error:
            raise TransferError(f"{endpoint.incarnation}: odd TCP metadata: {error}") from error
        return metadata.host, metadata.port

    def _drop(self, peer: _Peer, reason: str) -> None:
        _log.debug("%s: %s", peer.incarnation, reason)
        del self._peers[peer.incarnation]
        self._selector.unregister(peer.channel)
        peer.channel.close()
        for read in peer.reads:
            read.state = ReadState.FAILED
            read.receiving = None
        peer.reads.clear()

    # -- reads -------------------------------------------------------------------------------------

    def read(self, incarnation: str, runs: Sequence[ByteRun]) -> ReadHandle:
        peer = self._peers.get(incarnation)
        if peer is None:
            raise TransferError(f"{incarnation} is not connected")
        if len(runs) > MAX_RUNS:
            raise TransferError(f"{len(runs)} runs in one read, {MAX_RUNS} allowed")
        check_runs(runs, peer.num_bytes, len(self._memory))
        read = _TcpRead(incarnation, runs)
        if not runs:
            read.state = ReadState.DONE
            return read
        read.receiving = Cursor(self._memory, [(run.target_offset, run.num_bytes) for run in runs])
        peer.reads.append(read)
        wanted = np.array([(run.source_offset, run.num_bytes) for run in runs], dtype="<u8")
        peer.to_send += COUNT.pack(len(runs)) + wanted.tobytes()
        self._turn(peer)
        return read

    def poll(self, handle: ReadHandle) -> ReadState:
        assert isinstance(handle, _TcpRead)
        peer = self._peers.get(handle.incarnation)
        if handle.state is ReadState.IN_FLIGHT and peer is not None:
            self._turn(peer)
        return handle.state

    def progress(self) -> None:
        if self._source is not None:
            self._source.progress()
        for key, _ in self._selector.select(0):
            self._turn(key.data)
        now = time.monotonic()
        for peer in [p for p in self._peers.values() if not p.is_proven and p.deadline < now]:
            self._drop(peer, "it does not answer")

    def close(self) -> None:
        for peer in list(self._peers.values()):
            self._drop(peer, "closing")
        if self._source is not None:
            self._source.close()
            self._source = None
        self._selector.close()

    def _turn(self, peer: _Peer) -> None:
        """Send and receive what goes without waiting, within bounds."""
        try:
            self._send(peer)
            for _ in range(_CALLS_PER_TURN):
                self._receive(peer)
        except BlockingIOError:
            pass
        except (OSError, TransferError) as error:
            self._drop(peer, str(error))
            return
        events = selectors.EVENT_READ
        if peer.is_ready and peer.to_send:
            events |= selectors.EVENT_WRITE
        self._selector.modify(peer.channel, events, peer)

    def _send(self, peer: _Peer) -> None:
        if not peer.is_ready or not peer.to_send:
            return
        try:
            del peer.to_send[: peer.channel.send(peer.to_send)]
        except BlockingIOError:  # what is there can be received all the same
            return

    def _receive(self, peer: _Peer) -> None:
        if not peer.is_ready:
            piece = peer.channel.recv(NONCE_BYTES - len(peer.nonce))
            peer.nonce += piece
            num_bytes = len(piece)
            if peer.is_ready:
                peer.to_send[:0] = peer.own_nonce + self._proof(peer, "reader")
                self._send(peer)
        elif not peer.is_proven:
            piece = peer.channel.recv(PROOF_BYTES - len(peer.proof))
            peer.proof += piece
            num_bytes = len(piece)
            is_right = hmac.compare_digest(peer.proof, self._proof(peer, "source"))
            if peer.is_proven and not is_right:
                raise TransferError("it does not know the cluster's token")
        elif peer.reads:
            num_bytes = self._receive_kv(peer)
        else:
            num_bytes = len(peer.channel.recv(1))
            if num_bytes:
                raise TransferError("it sends what nobody asked for")
        if not num_bytes:
            raise TransferError("closed by the source")

    def _proof(self, peer: _Peer, end: str) -> bytes:
        return prove_end(self._token, end, peer.incarnation, peer.nonce, peer.own_nonce)

    def _receive_kv(self, peer: _Peer) -> int:
        read = peer.reads[0]
        assert read.receiving is not None
        num_bytes: int = peer.channel.recvmsg_into(read.receiving.views())[0]
        read.receiving.advance(num_bytes)
        if read.receiving.is_done:
            read.state = ReadState.DONE
            read.receiving = None
            peer.reads.popleft()
        return num_bytes
