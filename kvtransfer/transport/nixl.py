"""KV over NIXL and its UCX backend: shared memory, TCP, RDMA or NVLink, as UCX is configured.

The life of a read
1. ``read`` cuts the runs into pieces and the pieces into posts of bounded size, because on a CPU
   the copy may take place inside the call that posts it;
2. one post is in flight at a time; the ``poll`` that sees it end posts the next;
3. a handle is released only after it was seen to end. NIXL does not cancel: releasing an active
   handle leaves its bytes landing.

The progress thread is off, since it would burn a core. Reads carry no NIXL notification: one that
does hangs until its source polls, and read-then-validate confirms over the control plane anyway.
An agent's name is its process's incarnation and is never used again.
"""

import hmac
import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
from nixl import nixl_agent, nixl_agent_config

from kvcache.pool import KVPool
from kvtransfer.plan import ByteRun
from kvtransfer.transport.interface import KVTransport, ReadHandle, ReadState, check_runs
from kvtransfer.transport.nixl_library import NIXL_ERRORS, guard_wakeups, route_library_log
from protocol.errors import ConfigError, TransferError
from protocol.kv import RankEndpoint
from protocol.proof import prove

_log = logging.getLogger(__name__)

MAX_METADATA_BYTES = 256 << 10
_POST_BYTES = {"DRAM": 8 << 20, "VRAM": 256 << 20}


class _Memory(msgspec.Struct, frozen=True, array_like=True):
    """A registered pool as NIXL addresses it."""

    segment: str  # "DRAM" or "VRAM"
    device_id: int


class _Metadata(msgspec.Struct, frozen=True, array_like=True):
    agent: bytes  # NIXL's own
    memory: _Memory
    proof: bytes  # that a rank of this cluster says so of itself


class _Peer(msgspec.Struct, frozen=True):
    base_address: int
    num_bytes: int
    memory: _Memory


_Pieces = npt.NDArray[np.int64]  # [n, 3]: source offset, target offset, bytes


class _NixlRead(ReadHandle):
    def __init__(self, incarnation: str, runs: Sequence[ByteRun]) -> None:
        super().__init__(incarnation, runs)
        self.state = ReadState.IN_FLIGHT
        self.waiting: deque[_Pieces] = deque()
        self.peer: _Peer | None = None
        self.posted: object | None = None  # the NIXL handle of the post in flight


class NixlTransport(KVTransport):
    """One NIXL agent with the UCX backend.

    Args:
        incarnation: of this rank's process; unique for all time.
        token: the cluster's; metadata that is not made with it is refused.
        post_bytes: of one post at most; None goes by the memory.

    Raises:
        ConfigError: NIXL cannot start its UCX backend here.
    """

    name = "nixl"

    def __init__(self, incarnation: str, token: str, post_bytes: int | None = None) -> None:
        self._incarnation = incarnation
        self._token = token
        route_library_log()
        config = nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        try:
            self._agent = nixl_agent(incarnation, config)
        except (*NIXL_ERRORS, RuntimeError) as error:
            raise ConfigError(f"NIXL cannot start UCX ({error}): use --transport tcp") from error
        if "UCX" not in self._agent.backends:
            raise ConfigError("NIXL has no UCX plugin: use --transport tcp")
        guard_wakeups()
        self._post_bytes = post_bytes
        self._pool: KVPool | None = None
        self._memory = _Memory("DRAM", 0)
        self._registered: object | None = None
        self._peers: dict[str, _Peer] = {}
        self._in_flight: Counter[str] = Counter()  # reads per peer
        self._leaving: set[str] = set()  # disconnected while reads were in flight
        self._unreleased: list[object] = []  # ended handles that NIXL would not take back yet

    def start(self, pool: KVPool) -> None:
        if pool.device.type == "cuda":
            self._memory = _Memory("VRAM", pool.device.index or 0)
        region = (pool.base_address, pool.layout.num_bytes, self._memory.device_id, "")
        try:
            self._registered = self._agent.register_memory([region], self._memory.segment)
        except NIXL_ERRORS as error:
            raise TransferError(f"NIXL cannot register the KV pool: {error}") from error
        self._pool = pool

    def metadata(self) -> bytes:
        agent = self._agent.get_agent_metadata()
        encoded = msgspec.msgpack.encode(
            _Metadata(agent, self._memory, self._prove(self._incarnation, agent, self._memory))
        )
        assert len(encoded) <= MAX_METADATA_BYTES, len(encoded)
        return encoded

    # -- peers -------------------------------------------------------------------------------------

    def connect(self, endpoint: RankEndpoint) -> None:
        incarnation = endpoint.incarnation
        if incarnation in self._peers:
            return
        if incarnation in self._leaving:
            raise TransferError(f"{incarnation} was disconnected and has reads in flight")
        metadata = self._decode(endpoint)
        try:
            name = self._agent.add_remote_agent(metadata.agent)
        except NIXL_ERRORS as error:
            raise TransferError(f"NIXL does not accept {incarnation}: {error}") from error
        if isinstance(name, bytes):
            name = name.decode("utf-8", "replace")
        if name != incarnation:
            self._remove(name)
            raise TransferError(f"the NIXL agent of {incarnation} calls itself {name}")
        try:
            self._agent.make_connection(incarnation)
        except NIXL_ERRORS as error:
            self._remove(incarnation)
            raise TransferError(f"NIXL cannot connect to {incarnation}: {error}") from error
        self._peers[incarnation] = _Peer(
            endpoint.base_address, endpoint.layout.num_bytes, metadata.memory
        )

    def disconnect(self, incarnation: str) -> None:
        if self._peers.pop(incarnation, None) is None:
            return
        if self._in_flight[incarnation]:
            self._leaving.add(incarnation)
        else:
            self._remove(incarnation)

    def _decode(self, endpoint: RankEndpoint) -> _Metadata:
        if endpoint.transport != self.name:
            raise TransferError(f"rank {endpoint.rank} speaks {endpoint.transport}, this one nixl")
        if len(endpoint.agent_metadata) > MAX_METADATA_BYTES:
            raise TransferError(f"{endpoint.incarnation}: NIXL metadata is too long")
        try:
            metadata = msgspec.msgpack.decode(endpoint.agent_metadata, type=_Metadata)
        except msgspec.DecodeError as error:
            raise TransferError(f"{endpoint.incarnation}: odd NIXL metadata: {error}") from error
        proof = self._prove(endpoint.incarnation, metadata.agent, metadata.memory)
        if not hmac.compare_digest(proof, metadata.proof):
            raise TransferError(f"{endpoint.incarnation}: its NIXL metadata is not of this cluster")
        return metadata

    def _prove(self, incarnation: str, agent: bytes, memory: _Memory) -> bytes:
        """NIXL checks these bytes little, so only those of this cluster's ranks may reach it."""
        encoded = msgspec.msgpack.encode(memory)
        return prove(self._token, "baton 3 nixl", incarnation.encode(), agent, encoded)

    def _remove(self, agent_name: str) -> None:
        try:
            self._agent.remove_remote_agent(agent_name)
        except NIXL_ERRORS as error:  # the peer has died first
            _log.debug("removing %s: %s", agent_name, error)

    # -- reads -------------------------------------------------------------------------------------

    def read(self, incarnation: str, runs: Sequence[ByteRun]) -> ReadHandle:
        assert self._pool is not None, "start() comes first"
        peer = self._peers.get(incarnation)
        if peer is None:
            raise TransferError(f"{incarnation} is not connected")
        check_runs(runs, peer.num_bytes, self._pool.layout.num_bytes)
        read = _NixlRead(incarnation, runs)
        if not runs:
            read.state = ReadState.DONE
            return read
        read.peer = peer
        read.waiting.extend(_cut(runs, self._post_bytes or _POST_BYTES[self._memory.segment]))
        self._in_flight[incarnation] += 1
        try:
            self._post_next(read)
        except NIXL_ERRORS as error:
            self._end(read, ReadState.FAILED)
            raise TransferError(f"cannot read from {incarnation}: {error}") from error
        return read

    def poll(self, handle: ReadHandle) -> ReadState:
        assert isinstance(handle, _NixlRead)
        if handle.state is not ReadState.IN_FLIGHT:
            return handle.state
        try:
            status = self._agent.check_xfer_state(handle.posted)
            if status == "DONE" and handle.waiting:
                self._release(handle)
                self._post_next(handle)
            elif status == "DONE":
                self._end(handle, ReadState.DONE)
            elif status != "PROC":
                self._end(handle, ReadState.FAILED)
        except NIXL_ERRORS as error:
            _log.warning("read from %s failed: %s", handle.incarnation, error)
            self._end(handle, ReadState.FAILED)
        return handle.state

    def _post_next(self, read: _NixlRead) -> None:
        assert self._pool is not None
        assert read.peer is not None
        pieces = read.waiting.popleft()
        local = self._descriptors(pieces, 1, self._pool.base_address, self._memory)
        remote = self._descriptors(pieces, 0, read.peer.base_address, read.peer.memory)
        read.posted = self._agent.initialize_xfer("READ", local, remote, read.incarnation)
        self._agent.transfer(read.posted)  # its state is read by the next poll

    def _descriptors(
        self, pieces: _Pieces, column: int, base_address: int, memory: _Memory
    ) -> object:
        rows = np.empty((len(pieces), 3), dtype=np.uint64)  # address, bytes, device
        rows[:, 0] = pieces[:, column]
        rows[:, 0] += np.uint64(base_address)
        rows[:, 1] = pieces[:, 2]
        rows[:, 2] = memory.device_id
        return self._agent.get_xfer_descs(rows, memory.segment)

    def _release(self, read: _NixlRead) -> None:
        handle = read.posted
        read.posted = None
        if handle is None:
            return
        try:
            self._agent.release_xfer_handle(handle)
        except NIXL_ERRORS as error:
            _log.warning("a handle of %s cannot be released yet: %s", read.incarnation, error)
            self._unreleased.append(handle)

    def _end(self, read: _NixlRead, state: ReadState) -> None:
        read.state = state
        read.waiting.clear()
        self._release(read)
        self._in_flight[read.incarnation] -= 1
        if not self._in_flight[read.incarnation]:
            del self._in_flight[read.incarnation]
            if read.incarnation in self._leaving:
                self._leaving.remove(read.incarnation)
                self._remove(read.incarnation)

    # -- both directions ---------------------------------------------------------------------------

    def progress(self) -> None:
        try:
            self._agent.get_new_notifs()  # drives UCX; no notification is ever sent
        except NIXL_ERRORS as error:
            _log.debug("progress: %s", error)

    def close(self) -> None:
        for incarnation in list(self._peers):
            self.disconnect(incarnation)
        if self._registered is None or self._in_flight:
            return  # with reads in flight only the end of the process is safe
        registered = self._registered
        self._registered = None
        try:
            self._agent.deregister_memory(registered)
        except NIXL_ERRORS as error:
            _log.debug("deregistering: %s", error)


def _cut(runs: Sequence[ByteRun], post_bytes: int) -> Iterator[_Pieces]:
    """Posts of at most ``post_bytes``, in order; a longer run is cut into several pieces."""
    post: list[tuple[int, int, int]] = []
    room = post_bytes
    for run in runs:
        done = 0
        while done < run.num_bytes:
            size = min(run.num_bytes - done, room)
            post.append((run.source_offset + done, run.target_offset + done, size))
            done += size
            room -= size
            if not room:
                yield np.array(post, dtype=np.int64)
                post = []
                room = post_bytes
    if post:
        yield np.array(post, dtype=np.int64)
