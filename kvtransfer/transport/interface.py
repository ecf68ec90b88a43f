"""How bytes move between the KV pools of two ranks: a pull, behind one interface.

The life of a read
1. each rank ``start``s its transport on its pool and publishes ``metadata()`` in its RankEndpoint;
2. a rank that will read from another ``connect``s to that endpoint, once per incarnation;
3. ``read`` posts a list of byte runs from the peer's pool into the own one and returns at once;
4. ``progress`` and ``poll`` move it along; ``poll`` says DONE or FAILED exactly once it has ended.

There is no cancel. Until ``poll`` has returned DONE or FAILED, bytes may still land in the target
blocks, so they must be kept out of use until then. After FAILED any part of the bytes may have
landed, and none may be used.

One thread owns a transport and makes every call on it. Both sides must call ``progress`` often
(each millisecond or so while anything is in flight): the source's side of a read may need it.
"""

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence

from kvcache.pool import KVPool
from kvtransfer.plan import ByteRun
from protocol.errors import TransferError
from protocol.kv import RankEndpoint


class ReadState(enum.Enum):
    """Where a read stands. DONE and FAILED are final: nothing lands any more."""

    IN_FLIGHT = "in_flight"
    DONE = "done"
    FAILED = "failed"


class ReadHandle:
    """One posted read; opaque to its owner but for its size."""

    def __init__(self, incarnation: str, runs: Sequence[ByteRun]) -> None:
        self.incarnation = incarnation
        self.num_descriptors = len(runs)
        self.num_bytes = sum(run.num_bytes for run in runs)


class KVTransport(ABC):
    """Moves runs of bytes from other ranks' pools into the own one. For one thread."""

    name: str  # what RankEndpoint.transport says; only equal ones connect

    @abstractmethod
    def start(self, pool: KVPool) -> None:
        """Register the pool's memory, and serve reads from it if the transport needs that.

        Called once, before anything else.

        Raises:
            TransferError: the memory cannot be registered or the listener not be bound.
        """

    @abstractmethod
    def metadata(self) -> bytes:
        """What another rank needs to connect, for ``RankEndpoint.agent_metadata``."""

    @abstractmethod
    def connect(self, endpoint: RankEndpoint) -> None:
        """Make ``endpoint.incarnation`` readable. Idempotent, takes a bounded time (seconds).

        Both sides' ``progress`` may have to run for it. The caller has verified where the endpoint
        comes from.

        Raises:
            TransferError: the peer speaks another transport, cannot be reached, or its metadata
                is not acceptable.
        """

    @abstractmethod
    def disconnect(self, incarnation: str) -> None:
        """Forget a peer. Idempotent. Reads in flight go on and must still be polled to their end;
        they end FAILED at once only where the transport can promise that no byte lands later.
        """

    @abstractmethod
    def read(self, incarnation: str, runs: Sequence[ByteRun]) -> ReadHandle:
        """Post a read of all ``runs`` and return without waiting. Zero runs are fine: DONE.

        Args:
            incarnation: of a connected peer.
            runs: offsets relative to the bases of the peer's and of the own pool.

        Raises:
            TransferError: the peer is unknown or gone, or a run lies outside the own pool. Nothing
                is posted and no byte lands.
        """

    @abstractmethod
    def poll(self, handle: ReadHandle) -> ReadState:
        """Move a read along and say where it stands; never raises for a peer's failure.

        A final state is returned for ever, and what the handle held is released with it.
        """

    @abstractmethod
    def progress(self) -> None:
        """Let pending work of both directions go on, without waiting."""

    @abstractmethod
    def close(self) -> None:
        """Release everything. Idempotent. Called only when no read is in flight, or when the
        process ends: the pool's memory must not be used for anything else afterwards.
        """


def check_runs(runs: Sequence[ByteRun], source_bytes: int, target_bytes: int) -> None:
    """Refuse runs that leave either pool; offsets may come from a peer.

    Raises:
        TransferError: a run is empty, or not inside both pools.
    """
    for run in runs:
        if (
            run.num_bytes <= 0
            or not 0 <= run.source_offset <= source_bytes - run.num_bytes
            or not 0 <= run.target_offset <= target_bytes - run.num_bytes
        ):
            raise TransferError(f"{run} leaves pools of {source_bytes} and {target_bytes} bytes")
