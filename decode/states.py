"""The states of a request in a decode pool, and the only ways from one to another.

::

    QUEUED --grant--> OPENING --opened--> RESERVED --committed--+
      |                  |                   |                  v
      |                  +---compute_here----+             RUNNING <--resume-- PREEMPTED
      |                            v                        ^  |  \\---preempt----^
      |                        SWITCHING ------closed-------+  |
      +---------------------grant_local------------------------+ end --> RELEASED

    QUEUED --load--> LOADING --grant or grant_local--> as from QUEUED
    LOADING, OPENING, RESERVED, SWITCHING --close--> CLOSING --closed or committed--> RELEASED

QUEUED holds no block. From LOADING, in which a store writes into the blocks of the prefix, to
SWITCHING a peer may write into the blocks, so they are in transfer; CLOSING has given up their
ownership and waits until no byte can land any more. A commit that crosses the order to close ends a
hand-off just as well as its closure does. RUNNING covers prefill and decode alike:
``num_computed_tokens`` tells how far a sequence is.
"""

import enum


class State(enum.Enum):
    """Where a request stands."""

    QUEUED = "queued"
    LOADING = "loading"  # blocks granted, a prefix comes up from a store
    OPENING = "opening"  # blocks granted, the ranks are told to expect a hand-off
    RESERVED = "reserved"  # the ticket is given
    SWITCHING = "switching"  # to be computed here; the unused hand-off is being closed
    RUNNING = "running"
    PREEMPTED = "preempted"  # no blocks; KV in host memory, or to be recomputed
    CLOSING = "closing"  # given up, but bytes may still land in its blocks
    RELEASED = "released"


class SequenceEvent(enum.Enum):
    """What can happen to a request."""

    LOAD = "load"
    GRANT = "grant"
    GRANT_LOCAL = "grant_local"
    OPENED = "opened"
    COMPUTE_HERE = "compute_here"
    COMMITTED = "committed"
    CLOSED = "closed"
    PREEMPT = "preempt"
    RESUME = "resume"
    CLOSE = "close"
    END = "end"


TABLE: dict[tuple[State, SequenceEvent], State] = {
    (State.QUEUED, SequenceEvent.LOAD): State.LOADING,
    (State.QUEUED, SequenceEvent.GRANT): State.OPENING,
    (State.QUEUED, SequenceEvent.GRANT_LOCAL): State.RUNNING,
    (State.QUEUED, SequenceEvent.END): State.RELEASED,
    (State.LOADING, SequenceEvent.GRANT): State.OPENING,
    (State.LOADING, SequenceEvent.GRANT_LOCAL): State.RUNNING,
    (State.LOADING, SequenceEvent.CLOSE): State.CLOSING,
    (State.OPENING, SequenceEvent.OPENED): State.RESERVED,
    (State.OPENING, SequenceEvent.COMPUTE_HERE): State.SWITCHING,
    (State.OPENING, SequenceEvent.CLOSE): State.CLOSING,
    (State.RESERVED, SequenceEvent.COMMITTED): State.RUNNING,
    (State.RESERVED, SequenceEvent.COMPUTE_HERE): State.SWITCHING,
    (State.RESERVED, SequenceEvent.CLOSE): State.CLOSING,
    (State.SWITCHING, SequenceEvent.CLOSED): State.RUNNING,
    (State.SWITCHING, SequenceEvent.COMMITTED): State.RUNNING,
    (State.SWITCHING, SequenceEvent.CLOSE): State.CLOSING,
    (State.RUNNING, SequenceEvent.PREEMPT): State.PREEMPTED,
    (State.RUNNING, SequenceEvent.END): State.RELEASED,
    (State.PREEMPTED, SequenceEvent.RESUME): State.RUNNING,
    (State.PREEMPTED, SequenceEvent.END): State.RELEASED,
    (State.CLOSING, SequenceEvent.CLOSED): State.RELEASED,
    (State.CLOSING, SequenceEvent.COMMITTED): State.RELEASED,
}
