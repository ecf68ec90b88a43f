"""Everything that can come to a node: messages between nodes, and steps that it takes by itself."""

from dataclasses import dataclass

from kvtransfer.events import Command, Event
from kvtransfer.plan import ByteRun
from protocol.handoff import HandoffMessage
from protocol.messages import ToCoordinator, ToRank

COORDINATOR = "coordinator"
LAUNCHER = "launcher"


@dataclass(frozen=True, slots=True)
class Start:
    """launcher -> rank: this process starts, and is to say HELLO."""


@dataclass(frozen=True, slots=True)
class Died:
    """launcher -> coordinator: the processes of a pool have ended."""

    pool_id: str
    next: tuple[str, ...] = ()  # ranks that are started in their place


@dataclass(frozen=True, slots=True)
class Compute:
    """leader's main thread -> rank: write these (block, tag), and say so."""

    blocks: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Computed:
    """rank -> leader's main thread."""

    rank: int


Message = (
    HandoffMessage | ToRank | ToCoordinator | Command | Event | Start | Died | Compute | Computed
)
Outbox = list[tuple[str, str, Message]]  # (sender, receiver, message)

# -- steps -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submit:
    """The next caller comes."""


@dataclass(frozen=True, slots=True)
class Leave:
    """A caller leaves."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Wait:
    """A moment passes, for a request that waits for its next attempt."""


@dataclass(frozen=True, slots=True)
class StepEnds:
    """A step of a main thread: the scheduler is told what the ranks have computed."""


@dataclass(frozen=True, slots=True)
class LeaseEnds:
    """Whoever closes has waited long enough for its readers."""


@dataclass(frozen=True, slots=True)
class ReadEnds:
    """A read in flight is seen to its end."""

    incarnation: str  # of its source
    runs: tuple[ByteRun, ...]
    how: str  # one of the following


DONE, FAILED, CORRUPTED = "ends", "fails", "ends with wrong bytes"
Option = Submit | Leave | Wait | StepEnds | LeaseEnds | ReadEnds
