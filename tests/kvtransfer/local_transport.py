"""KV between ranks of one process: for tests, and for a cluster in one process.

A read is queued when it is posted and its bytes land when the reader polls or makes progress, not
before, so that the states in between are seen as with a real network. A test can hold the fabric:
then nothing lands until it is released, even for peers that were disconnected meanwhile.
"""

import threading
from collections.abc import Sequence

from kvcache.pool import KVPool
from kvtransfer.plan import ByteRun
from kvtransfer.transport.interface import KVTransport, ReadHandle, ReadState, check_runs
from protocol.errors import TransferError
from protocol.kv import RankEndpoint


class LocalFabric:
    """What the ranks of one process reach each other over. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pools: dict[str, KVPool] = {}
        self._is_held = False

    def hold(self) -> None:
        """Let no byte land, nor any read fail, until ``release``."""
        with self._lock:
            self._is_held = True

    def release(self) -> None:
        """Let what was held land at the reader's next poll."""
        with self._lock:
            self._is_held = False

    def join(self, incarnation: str, pool: KVPool) -> None:
        """Offer a pool for reading."""
        with self._lock:
            self._pools[incarnation] = pool

    def leave(self, incarnation: str) -> None:
        """Stop offering it, as when its process dies. Idempotent."""
        with self._lock:
            self._pools.pop(incarnation, None)

    def pool(self, incarnation: str) -> KVPool | None:
        """The pool of a rank that is there."""
        with self._lock:
            return self._pools.get(incarnation)

    @property
    def is_held(self) -> bool:
        with self._lock:
            return self._is_held


class _LocalRead(ReadHandle):
    def __init__(self, incarnation: str, runs: Sequence[ByteRun]) -> None:
        super().__init__(incarnation, runs)
        self.runs = tuple(runs)
        self.state = ReadState.IN_FLIGHT if runs else ReadState.DONE


class LocalTransport(KVTransport):
    """One rank on a :class:`LocalFabric`; bytes are copied by the reading thread."""

    name = "local"

    def __init__(self, incarnation: str, fabric: LocalFabric) -> None:
        self._incarnation = incarnation
        self._fabric = fabric
        self._pool: KVPool | None = None
        self._peers: set[str] = set()
        self._reads: list[_LocalRead] = []

    def start(self, pool: KVPool) -> None:
        self._pool = pool
        self._fabric.join(self._incarnation, pool)

    def metadata(self) -> bytes:
        return b""

    def connect(self, endpoint: RankEndpoint) -> None:
        if endpoint.transport != self.name:
            raise TransferError(f"rank {endpoint.rank} speaks {endpoint.transport}, this one local")
        if self._fabric.pool(endpoint.incarnation) is None:
            raise TransferError(f"{endpoint.incarnation} is not in this process")
        self._peers.add(endpoint.incarnation)

    def disconnect(self, incarnation: str) -> None:
        self._peers.discard(incarnation)

    def read(self, incarnation: str, runs: Sequence[ByteRun]) -> ReadHandle:
        assert self._pool is not None, "start() comes first"
        source = self._fabric.pool(incarnation)
        if incarnation not in self._peers or source is None:
            raise TransferError(f"{incarnation} is not connected")
        check_runs(runs, source.layout.num_bytes, self._pool.layout.num_bytes)
        read = _LocalRead(incarnation, runs)
        if runs:
            self._reads.append(read)
        return read

    def poll(self, handle: ReadHandle) -> ReadState:
        assert isinstance(handle, _LocalRead)
        if handle.state is ReadState.IN_FLIGHT:
            self.progress()
        return handle.state

    def progress(self) -> None:
        if self._fabric.is_held:
            return
        reads, self._reads = self._reads, []
        for read in reads:
            read.state = self._land(read)
            read.runs = ()

    def close(self) -> None:
        self._fabric.leave(self._incarnation)
        self._peers.clear()

    def _land(self, read: _LocalRead) -> ReadState:
        source = self._fabric.pool(read.incarnation)
        if source is None:
            return ReadState.FAILED
        assert self._pool is not None
        for run in read.runs:
            target = self._pool.bytes[run.target_offset : run.target_offset + run.num_bytes]
            target.copy_(source.bytes[run.source_offset : run.source_offset + run.num_bytes])
        return ReadState.DONE
