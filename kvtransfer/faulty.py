"""Failpoints of a transfer thread: its connections and its transport, made to fail on purpose.

Each class puts one method in front of the class that it stands in for, and is used only if
failpoints are configured. The faults are real: a late read is posted late and lands late, a
corrupted one has landed before its bytes are changed, a dropped frame is gone and has to be sent
again.
"""

import heapq
import itertools
import time
from collections import Counter
from collections.abc import Sequence

import zmq

from kvcache.pool import KVPool
from kvtransfer.identity import RankIdentity, TransferConfig
from kvtransfer.links.coordinator_connection import CoordinatorConnection
from kvtransfer.links.peers import Link, Peers
from kvtransfer.plan import ByteRun
from kvtransfer.transport.interface import KVTransport, ReadHandle, ReadState
from protocol.errors import TransferError
from protocol.frames import Frame, Numbered
from protocol.kv import RankEndpoint
from protocol.messages import ToCoordinator
from protocol.process.crash_points import exit_here
from protocol.process.failpoints import (
    CONTROL_SEND,
    CORRUPT,
    DELAY,
    DROP,
    DUPLICATE,
    EXIT,
    FAIL,
    HANDOFF_SEND,
    TRANSFER_READ,
    Failpoints,
    Fault,
    kind_of,
)
from protocol.sockets import Poller

_CORRUPTED_BYTES = 64
_FLIP = 0x20  # of each fourth byte: in fp32 and bf16 another finite number


class FaultyPeers(Peers):
    """Drops, repeats and delays frames to other ranks, below the layer that makes up for it."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        identity: RankIdentity,
        listen: str,
        counters: Counter[str],
        failpoints: Failpoints,
    ) -> None:
        super().__init__(context, identity, listen, counters)
        self._failpoints = failpoints
        self._numbers = itertools.count()
        self._late: list[tuple[float, int, Link, Frame]] = []  # a heap, by time

    def _transmit(self, link: Link, frame: Frame) -> None:
        kind = kind_of(type(frame.message if isinstance(frame, Numbered) else frame))
        fault = self._failpoints.reach(HANDOFF_SEND, kind)
        match fault:
            case Fault(action="drop"):
                return
            case Fault(action="delay", seconds=seconds):
                due = time.monotonic() + seconds
                heapq.heappush(self._late, (due, next(self._numbers), link, frame))
                return
            case Fault(action="exit"):
                exit_here(f"{HANDOFF_SEND}.{kind}")
            case Fault(action="duplicate"):
                super()._transmit(link, frame)
        super()._transmit(link, frame)

    def keep_up(self, now: float) -> None:
        while self._late and self._late[0][0] <= now:
            _, _, link, frame = heapq.heappop(self._late)
            if self._links.get(link.routing_id) is link:
                super()._transmit(link, frame)
        super().keep_up(now)


class FaultyCoordinatorConnection(CoordinatorConnection):
    """Drops, repeats and delays what is sent to the coordinator."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        identity: RankIdentity,
        config: TransferConfig,
        poller: Poller,
        failpoints: Failpoints,
    ) -> None:
        super().__init__(context, identity, config, failpoints.hits, poller)
        self._failpoints = failpoints
        self._numbers = itertools.count()
        self._late: list[tuple[float, int, ToCoordinator]] = []  # a heap, by time

    def send(self, message: ToCoordinator) -> None:
        fault = self._failpoints.reach(CONTROL_SEND, kind_of(type(message)))
        action = fault.action if fault is not None else ""
        if action == EXIT:
            exit_here(f"{CONTROL_SEND}.{kind_of(type(message))}")
        if fault is not None and action == DELAY:
            due = time.monotonic() + fault.seconds
            heapq.heappush(self._late, (due, next(self._numbers), message))
        if action not in (DELAY, DROP):
            super().send(message)
        if action == DUPLICATE:
            super().send(message)

    def beat(self, now: float) -> None:
        while self._late and self._late[0][0] <= now:
            super().send(heapq.heappop(self._late)[2])
        super().beat(now)


class _FaultyRead(ReadHandle):
    """A read with something wrong: ``inner`` is the real one, None until it is posted."""

    def __init__(self, incarnation: str, runs: Sequence[ByteRun], fault: Fault) -> None:
        super().__init__(incarnation, runs)
        self.fault = fault
        self.runs = tuple(runs)
        self.due = time.monotonic() + fault.seconds
        self.inner: ReadHandle | None = None
        self.state = ReadState.IN_FLIGHT


class FaultyTransport(KVTransport):
    """A transport whose reads come late, come out wrong or fail."""

    def __init__(self, inner: KVTransport, failpoints: Failpoints) -> None:
        self.name = inner.name
        self._inner = inner
        self._failpoints = failpoints
        self._pool: KVPool | None = None

    def start(self, pool: KVPool) -> None:
        self._pool = pool
        self._inner.start(pool)

    def metadata(self) -> bytes:
        return self._inner.metadata()

    def connect(self, endpoint: RankEndpoint) -> None:
        self._inner.connect(endpoint)

    def disconnect(self, incarnation: str) -> None:
        self._inner.disconnect(incarnation)

    def progress(self) -> None:
        self._inner.progress()

    def close(self) -> None:
        self._inner.close()

    def read(self, incarnation: str, runs: Sequence[ByteRun]) -> ReadHandle:
        fault = self._failpoints.reach(TRANSFER_READ)
        if fault is None:
            return self._inner.read(incarnation, runs)
        if fault.action == FAIL:
            raise TransferError(f"failpoint {TRANSFER_READ}")
        if fault.action == EXIT:
            exit_here(TRANSFER_READ)
        read = _FaultyRead(incarnation, runs, fault)
        if fault.action != DELAY:
            read.inner = self._inner.read(incarnation, runs)
        return read

    def poll(self, handle: ReadHandle) -> ReadState:
        if not isinstance(handle, _FaultyRead):
            return self._inner.poll(handle)
        if handle.state is ReadState.IN_FLIGHT:
            handle.state = self._poll_faulty(handle)
        return handle.state

    def _poll_faulty(self, read: _FaultyRead) -> ReadState:
        if read.inner is None:
            if time.monotonic() < read.due:
                return ReadState.IN_FLIGHT
            try:
                read.inner = self._inner.read(read.incarnation, read.runs)
            except TransferError:
                return ReadState.FAILED
        state = self._inner.poll(read.inner)
        if state is ReadState.DONE and read.fault.action == CORRUPT and read.runs:
            self._corrupt(read.runs[0])
        return state

    def _corrupt(self, run: ByteRun) -> None:
        assert self._pool is not None, "start() comes first"
        end = run.target_offset + min(run.num_bytes, _CORRUPTED_BYTES)
        self._pool.bytes[run.target_offset + 2 : end : 4] ^= _FLIP
