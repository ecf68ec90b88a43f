"""The states of a batch. Pure; the table is all there is.

VALIDATING --valid--> IN_PROGRESS --done--> FINALIZING --written--> COMPLETED
VALIDATING --refuse--> FAILED. Until the last line is done a batch may be cancelled, or expire: what
has been answered by then is written, and what has not is named in the error file. What processes
have died of is set aside, until somebody has it tried again.
"""

import enum


class State(enum.Enum):
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
    EXPIRE = "expire"
    CANCEL = "cancel"
    SET_ASIDE = "set_aside"
    VALIDATE_AGAIN = "validate_again"
    WRITE_AGAIN = "write_again"


RUNNING = frozenset({State.VALIDATING, State.IN_PROGRESS})
WRITING = frozenset({State.FINALIZING, State.EXPIRING, State.CANCELLING})
OPEN = RUNNING | WRITING  # something is still to be done

TABLE: dict[tuple[State, BatchEvent], State] = {
    (State.VALIDATING, BatchEvent.VALID): State.IN_PROGRESS,
    (State.VALIDATING, BatchEvent.REFUSE): State.FAILED,
    (State.IN_PROGRESS, BatchEvent.DONE): State.FINALIZING,
    **{(state, BatchEvent.EXPIRE): State.EXPIRING for state in State if state in RUNNING},
    **{(state, BatchEvent.CANCEL): State.CANCELLING for state in State if state in RUNNING},
    **{(state, BatchEvent.SET_ASIDE): State.SET_ASIDE for state in State if state in OPEN},
    (State.SET_ASIDE, BatchEvent.VALIDATE_AGAIN): State.VALIDATING,
    (State.SET_ASIDE, BatchEvent.WRITE_AGAIN): State.FINALIZING,
    (State.SET_ASIDE, BatchEvent.CANCEL): State.CANCELLING,
    (State.SET_ASIDE, BatchEvent.EXPIRE): State.EXPIRING,
    (State.FINALIZING, BatchEvent.WRITTEN): State.COMPLETED,
    (State.EXPIRING, BatchEvent.WRITTEN): State.EXPIRED,
    (State.CANCELLING, BatchEvent.WRITTEN): State.CANCELLED,
}
