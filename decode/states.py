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


class SequenceState(enum.Enum):
    """Where a request stands."""

    QUEUED = "queued"
    LOADING = "loading"  # blocks granted, a prefix comes up from a store
    OPENING = "opening"  # blocks granted, the ranks open the hand-off
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


TABLE: dict[tuple[SequenceState, SequenceEvent], SequenceState] = {
    (SequenceState.QUEUED, SequenceEvent.LOAD): SequenceState.LOADING,
    (SequenceState.QUEUED, SequenceEvent.GRANT): SequenceState.OPENING,
    (SequenceState.QUEUED, SequenceEvent.GRANT_LOCAL): SequenceState.RUNNING,
    (SequenceState.QUEUED, SequenceEvent.END): SequenceState.RELEASED,
    (SequenceState.LOADING, SequenceEvent.GRANT): SequenceState.OPENING,
    (SequenceState.LOADING, SequenceEvent.GRANT_LOCAL): SequenceState.RUNNING,
    (SequenceState.LOADING, SequenceEvent.CLOSE): SequenceState.CLOSING,
    (SequenceState.OPENING, SequenceEvent.OPENED): SequenceState.RESERVED,
    (SequenceState.OPENING, SequenceEvent.COMPUTE_HERE): SequenceState.SWITCHING,
    (SequenceState.OPENING, SequenceEvent.CLOSE): SequenceState.CLOSING,
    (SequenceState.RESERVED, SequenceEvent.COMMITTED): SequenceState.RUNNING,
    (SequenceState.RESERVED, SequenceEvent.COMPUTE_HERE): SequenceState.SWITCHING,
    (SequenceState.RESERVED, SequenceEvent.CLOSE): SequenceState.CLOSING,
    (SequenceState.SWITCHING, SequenceEvent.CLOSED): SequenceState.RUNNING,
    (SequenceState.SWITCHING, SequenceEvent.COMMITTED): SequenceState.RUNNING,
    (SequenceState.SWITCHING, SequenceEvent.CLOSE): SequenceState.CLOSING,
    (SequenceState.RUNNING, SequenceEvent.PREEMPT): SequenceState.PREEMPTED,
    (SequenceState.RUNNING, SequenceEvent.END): SequenceState.RELEASED,
    (SequenceState.PREEMPTED, SequenceEvent.RESUME): SequenceState.RUNNING,
    (SequenceState.PREEMPTED, SequenceEvent.END): SequenceState.RELEASED,
    (SequenceState.CLOSING, SequenceEvent.CLOSED): SequenceState.RELEASED,
    (SequenceState.CLOSING, SequenceEvent.COMMITTED): SequenceState.RELEASED,
}
