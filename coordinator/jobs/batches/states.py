"""The states of a batch. Pure; the table is all there is.

VALIDATING --valid--> IN_PROGRESS --done--> FINALIZING --written--> COMPLETED
VALIDATING --refuse--> FAILED. Until the last line is done a batch may be cancelled, or expire: what
has been answered by then is written, and what has not is named in the error file. What processes
have died of is set aside, until somebody has it tried again.
"""

import enum

from coordinator.jobs.engine.job import JobEvent


class BatchState(enum.Enum):
    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    EXPIRING = "expiring"  # callers see it as finalizing
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    SET_ASIDE = "set_aside"  # callers see it as failed
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class BatchEvent(enum.Enum):
    VALID = "valid"
    REFUSE = "refuse"
    DONE = "done"
    WRITTEN = "written"
    # A batch that was set aside goes on where it was.
    VALIDATE_AGAIN = "validate_again"
    WRITE_AGAIN = "write_again"
    CANCEL_AGAIN = "cancel_again"
    EXPIRE_AGAIN = "expire_again"


RUNNING = frozenset({BatchState.VALIDATING, BatchState.IN_PROGRESS})
WRITING = frozenset({BatchState.FINALIZING, BatchState.EXPIRING, BatchState.CANCELLING})
OPEN = RUNNING | WRITING  # something is still to be done
ENDED = frozenset(
    {BatchState.COMPLETED, BatchState.FAILED, BatchState.EXPIRED, BatchState.CANCELLED}
)

TABLE: dict[tuple[BatchState, BatchEvent | JobEvent], BatchState] = {
    (BatchState.VALIDATING, BatchEvent.VALID): BatchState.IN_PROGRESS,
    (BatchState.VALIDATING, BatchEvent.REFUSE): BatchState.FAILED,
    (BatchState.IN_PROGRESS, BatchEvent.DONE): BatchState.FINALIZING,
    **{(state, JobEvent.EXPIRE): BatchState.EXPIRING for state in BatchState if state in RUNNING},
    **{(state, JobEvent.CANCEL): BatchState.CANCELLING for state in BatchState if state in RUNNING},
    **{(state, JobEvent.SET_ASIDE): BatchState.SET_ASIDE for state in BatchState if state in OPEN},
    (BatchState.SET_ASIDE, BatchEvent.VALIDATE_AGAIN): BatchState.VALIDATING,
    (BatchState.SET_ASIDE, BatchEvent.WRITE_AGAIN): BatchState.FINALIZING,
    (BatchState.SET_ASIDE, BatchEvent.CANCEL_AGAIN): BatchState.CANCELLING,
    (BatchState.SET_ASIDE, BatchEvent.EXPIRE_AGAIN): BatchState.EXPIRING,
    (BatchState.FINALIZING, BatchEvent.WRITTEN): BatchState.COMPLETED,
    (BatchState.EXPIRING, BatchEvent.WRITTEN): BatchState.EXPIRED,
    (BatchState.CANCELLING, BatchEvent.WRITTEN): BatchState.CANCELLED,
}
