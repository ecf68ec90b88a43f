"""The states of a document. Pure; the table is all there is.

QUEUED --start--> TOKENIZING --tokenized--> PREFILLING --computed--> STORING --stored--> READY
READY --evict--> EVICTED --rewarm--> QUEUED; READY --damage--> DAMAGED --rewarm--> QUEUED.
READY --rewarm--> QUEUED: what was made for another model, or stored otherwise, is made anew.
What cannot go on for now is queued again.
An end may come at any time: FAILED and CANCELLED may be resumed, EXPIRED may not. What has ended
the process that worked on it, or read it, is set aside: it has FAILED, from wherever it was.
"""

import enum


class State(enum.Enum):
    QUEUED = "queued"
    TOKENIZING = "tokenizing"  # its source is read, and encoded
    PREFILLING = "prefilling"  # its KV is computed, segment by segment
    STORING = "storing"  # everything is computed; it is seen to lie where it was promised
    READY = "ready"
    EVICTED = "evicted"  # it can be asked still, but what is missing is computed anew
    DAMAGED = "damaged"  # the same, but what is missing was lost by the disk
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"  # its deadline came first


class DocumentEvent(enum.Enum):
    START = "start"
    TOKENIZED = "tokenized"
    COMPUTED = "computed"
    STORED = "stored"
    LOSE_BLOCKS = "lose_blocks"  # some of what was stored has gone meanwhile
    REQUEUE = "requeue"  # it cannot go on for now, or the process that worked on it has ended
    EVICT = "evict"
    DAMAGE = "damage"
    REWARM = "rewarm"
    RESUME = "resume"
    FAIL = "fail"
    SET_ASIDE = "set_aside"  # processes have died of it
    CANCEL = "cancel"
    EXPIRE = "expire"


WORKING = frozenset({State.TOKENIZING, State.PREFILLING, State.STORING})
PENDING = WORKING | {State.QUEUED}  # something is still to be done, without anybody's asking
FINAL = frozenset({State.FAILED, State.CANCELLED, State.EXPIRED})
USABLE = frozenset({State.READY, State.EVICTED, State.DAMAGED})  # a question may name it

TABLE: dict[tuple[State, DocumentEvent], State] = {
    (State.QUEUED, DocumentEvent.START): State.TOKENIZING,
    (State.TOKENIZING, DocumentEvent.TOKENIZED): State.PREFILLING,
    (State.PREFILLING, DocumentEvent.COMPUTED): State.STORING,
    (State.STORING, DocumentEvent.STORED): State.READY,
    (State.STORING, DocumentEvent.LOSE_BLOCKS): State.PREFILLING,
    (State.TOKENIZING, DocumentEvent.REQUEUE): State.QUEUED,
    (State.PREFILLING, DocumentEvent.REQUEUE): State.QUEUED,
    (State.STORING, DocumentEvent.REQUEUE): State.QUEUED,
    (State.READY, DocumentEvent.EVICT): State.EVICTED,
    (State.EVICTED, DocumentEvent.REWARM): State.QUEUED,
    (State.READY, DocumentEvent.REWARM): State.QUEUED,  # as it was made it is of no use now
    (State.READY, DocumentEvent.DAMAGE): State.DAMAGED,
    (State.DAMAGED, DocumentEvent.REWARM): State.QUEUED,
    (State.FAILED, DocumentEvent.RESUME): State.QUEUED,
    (State.CANCELLED, DocumentEvent.RESUME): State.QUEUED,
    **{(state, DocumentEvent.FAIL): State.FAILED for state in State if state in PENDING},
    **{
        (state, DocumentEvent.SET_ASIDE): State.FAILED
        for state in State
        if state in PENDING | USABLE
    },
    **{(state, DocumentEvent.CANCEL): State.CANCELLED for state in State if state in PENDING},
    **{(state, DocumentEvent.EXPIRE): State.EXPIRED for state in State if state in PENDING},
}
