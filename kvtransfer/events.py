"""The commands and events between a rank's main thread and its other threads.

They go over queues, and the threads share no other state. Commands go to the transfer thread, or to
a store's disk threads; events come back. Both are plain data. A fetch has the same structs within a
rank as between ranks: ``Fetch`` is a command of the target's leader and an event of the source's,
and ``Serve`` or ``FetchRefused`` is that one's answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvcache.tiers.jobs import DiskDone, DiskJob
from protocol.handoff import Fetch, FetchRefused, SegmentKey, Serve
from protocol.kv import BlockRef, PoolEndpoint
from protocol.messages import BlockCounts, ToCoordinator, ToRank, Welcome
from protocol.request import RequestKey, TransferStats


@dataclass(frozen=True, slots=True)
class _OfRequest:
    """What is about one attempt at a request, as :class:`protocol.request.Keyed` is."""

    request_id: str
    attempt: int

    @property
    def key(self) -> RequestKey:
        """(request_id, attempt)."""
        return self.request_id, self.attempt


# -- commands: main thread -> transfer thread, disk threads ----------------------------------------


@dataclass(frozen=True, slots=True)
class SendControl:
    """Send a message to the coordinator."""

    message: ToCoordinator


@dataclass(frozen=True, slots=True)
class AnnounceBlocks(_OfRequest):
    """Source rank: these blocks of these layers are final. Opens the hand-off when it is the first.

    ``logical_blocks[i]`` lies here as ``blocks[i]``. Dropped when the hand-off was closed before.
    """

    target_pool_id: str
    target_epoch: int
    chunk: int
    layer_start: int
    layer_end: int
    logical_blocks: tuple[int, ...]
    blocks: tuple[BlockRef, ...]
    owners: tuple[int, ...] = ()  # the target's cp rank for each block; empty: every rank has all


@dataclass(frozen=True, slots=True)
class AnnouncedAll(_OfRequest):
    """Source rank: nothing more will be announced for this hand-off (zero segments is fine)."""

    target_pool_id: str
    target_epoch: int


@dataclass(frozen=True, slots=True)
class CommitWhenRead(_OfRequest):
    """Source leader: commit as soon as every rank of the own pool has sent SourceDone.

    ``manifest`` is what the plan dealt; the union of what the ranks announced must equal it.
    """

    target_pool_id: str
    target_epoch: int
    manifest: tuple[SegmentKey, ...]
    num_tokens: int
    first_token_id: int


@dataclass(frozen=True, slots=True)
class CloseSource(_OfRequest):
    """Source leader: end this side on every own rank; answered by SourceClosed. Idempotent."""


@dataclass(frozen=True, slots=True)
class OpenTargetBlocks(_OfRequest):
    """Target leader: expect a hand-off into these blocks on every own rank."""

    first_logical: int
    blocks: tuple[BlockRef, ...]
    owners: tuple[int, ...] = ()  # the cp rank on which each block lies; empty: on every rank


@dataclass(frozen=True, slots=True)
class CloseTarget(_OfRequest):
    """Target leader: end this side on every own rank; answered by TargetClosed. Idempotent."""


@dataclass(frozen=True, slots=True)
class Load:
    """The work that a leader has and the blocks that it holds; empty for a follower."""

    num_waiting: int = 0
    num_running: int = 0
    pending_tokens: int = 0
    blocks: tuple[BlockCounts, ...] = ()  # of each block space
    counters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReportStatus:
    """Any rank: the content of its next heartbeats. The transfer thread adds the step's age."""

    num_steps: int
    step_started: float | None  # time.monotonic(), None between steps
    load: Load = field(default_factory=Load)


@dataclass(frozen=True, slots=True)
class StopThread:
    """Flush what is queued, close everything and end the thread."""


Command = (
    SendControl
    | AnnounceBlocks
    | AnnouncedAll
    | CommitWhenRead
    | CloseSource
    | OpenTargetBlocks
    | CloseTarget
    | Fetch
    | Serve
    | FetchRefused
    | ReportStatus
    | StopThread
    | DiskJob
)

# -- events: transfer thread, disk threads -> main thread ------------------------------------------


@dataclass(frozen=True, slots=True)
class ControlReceived:
    """A message of the coordinator that the thread does not deal with itself."""

    message: ToRank


@dataclass(frozen=True, slots=True)
class Welcomed:
    """The gang may form."""

    welcome: Welcome


@dataclass(frozen=True, slots=True)
class PoolsChanged:
    """Every rank of these pools can be reached."""

    pools: tuple[PoolEndpoint, ...]


@dataclass(frozen=True, slots=True)
class TargetIsOpen(_OfRequest):
    """Target leader: every own rank expects the hand-off; the ticket may be given."""


@dataclass(frozen=True, slots=True)
class TargetCommitted(_OfRequest):
    """Target leader: every own rank holds exactly the manifest. The hand-off is closed by this."""

    num_tokens: int
    first_token_id: int
    stats: TransferStats


@dataclass(frozen=True, slots=True)
class TargetClosed(_OfRequest):
    """Target leader: no own rank has a read in flight, or will start one.

    The first ``num_whole_blocks`` of the blocks that were opened are read and confirmed in full, on
    every rank: they hold what the source had.
    """

    num_whole_blocks: int = 0


@dataclass(frozen=True, slots=True)
class SourceClosed(_OfRequest):
    """Source leader: committed or closed, and no target rank reads from these blocks any more."""

    committed: bool


@dataclass(frozen=True, slots=True)
class HandoffBroken(_OfRequest):
    """Leader of either side: the hand-off cannot complete. Close it, fail the request."""

    side: str  # "source" or "target"
    reason: str


@dataclass(frozen=True, slots=True)
class ThreadDied:
    """The transfer thread has ended, on request or by an error; the process must end too."""

    reason: str
    clean: bool


Event = (
    ControlReceived
    | Welcomed
    | PoolsChanged
    | TargetIsOpen
    | TargetCommitted
    | TargetClosed
    | SourceClosed
    | Fetch
    | HandoffBroken
    | DiskDone
    | ThreadDied
)
