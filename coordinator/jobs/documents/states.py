"""The states of a document. Pure; the table is all there is.

QUEUED --start--> TOKENIZING --tokenized--> PREFILLING --computed--> STORING --stored--> READY
READY --evict--> EVICTED --rewarm--> QUEUED; READY --damage--> DAMAGED --rewarm--> QUEUED.
READY --rewarm--> QUEUED: what was made for another model, or stored otherwise, is made anew.
What cannot go on for now is queued again.
An end may come at any time: FAILED and CANCELLED may be resumed, EXPIRED may not. What has ended
the process that worked on it, or read it, is set aside: it has FAILED, from wherever it was.
"""

import enum

from coordinator.jobs.engine.job import JobEvent


class DocumentState(enum.Enum):
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
    EVICT = "evict"
    DAMAGE = "damage"
    REWARM = "rewarm"
    RESUME = "resume"


WORKING = frozenset({DocumentState.TOKENIZING, DocumentState.PREFILLING, DocumentState.STORING})
PENDING = WORKING | {
    DocumentState.QUEUED
}  # something is still to be done, without anybody's asking
FINAL = frozenset({DocumentState.FAILED, DocumentState.CANCELLED, DocumentState.EXPIRED})
# A question may name it.
USABLE = frozenset({DocumentState.READY, DocumentState.EVICTED, DocumentState.DAMAGED})

TABLE: dict[tuple[DocumentState, DocumentEvent | JobEvent], DocumentState] = {
    (DocumentState.QUEUED, DocumentEvent.START): DocumentState.TOKENIZING,
    (DocumentState.TOKENIZING, DocumentEvent.TOKENIZED): DocumentState.PREFILLING,
    (DocumentState.PREFILLING, DocumentEvent.COMPUTED): DocumentState.STORING,
    (DocumentState.STORING, DocumentEvent.STORED): DocumentState.READY,
    (DocumentState.STORING, DocumentEvent.LOSE_BLOCKS): DocumentState.PREFILLING,
    (DocumentState.TOKENIZING, JobEvent.REQUEUE): DocumentState.QUEUED,
    (DocumentState.PREFILLING, JobEvent.REQUEUE): DocumentState.QUEUED,
    (DocumentState.STORING, JobEvent.REQUEUE): DocumentState.QUEUED,
    (DocumentState.READY, DocumentEvent.EVICT): DocumentState.EVICTED,
    (DocumentState.EVICTED, DocumentEvent.REWARM): DocumentState.QUEUED,
    # As it was made it is of no use now.
    (DocumentState.READY, DocumentEvent.REWARM): DocumentState.QUEUED,
    (DocumentState.READY, DocumentEvent.DAMAGE): DocumentState.DAMAGED,
    (DocumentState.DAMAGED, DocumentEvent.REWARM): DocumentState.QUEUED,
    (DocumentState.FAILED, DocumentEvent.RESUME): DocumentState.QUEUED,
    (DocumentState.CANCELLED, DocumentEvent.RESUME): DocumentState.QUEUED,
    **{(state, JobEvent.FAIL): DocumentState.FAILED for state in DocumentState if state in PENDING},
    **{
        (state, JobEvent.SET_ASIDE): DocumentState.FAILED
        for state in DocumentState
        if state in PENDING | USABLE
    },
    **{
        (state, JobEvent.CANCEL): DocumentState.CANCELLED
        for state in DocumentState
        if state in PENDING
    },
    **{
        (state, JobEvent.EXPIRE): DocumentState.EXPIRED
        for state in DocumentState
        if state in PENDING
    },
}
