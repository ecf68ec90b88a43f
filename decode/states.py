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

from protocol.errors import IllegalTransition


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


class Change(enum.Enum):
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


TABLE: dict[State, dict[Change, State]] = {
    State.QUEUED: {
        Change.LOAD: State.LOADING,
        Change.GRANT: State.OPENING,
        Change.GRANT_LOCAL: State.RUNNING,
        Change.END: State.RELEASED,
    },
    State.LOADING: {
        Change.GRANT: State.OPENING,
        Change.GRANT_LOCAL: State.RUNNING,
        Change.CLOSE: State.CLOSING,
    },
    State.OPENING: {
        Change.OPENED: State.RESERVED,
        Change.COMPUTE_HERE: State.SWITCHING,
        Change.CLOSE: State.CLOSING,
    },
    State.RESERVED: {
        Change.COMMITTED: State.RUNNING,
        Change.COMPUTE_HERE: State.SWITCHING,
        Change.CLOSE: State.CLOSING,
    },
    State.SWITCHING: {
        Change.CLOSED: State.RUNNING,
        Change.COMMITTED: State.RUNNING,
        Change.CLOSE: State.CLOSING,
    },
    State.RUNNING: {
        Change.PREEMPT: State.PREEMPTED,
        Change.END: State.RELEASED,
    },
    State.PREEMPTED: {
        Change.RESUME: State.RUNNING,
        Change.END: State.RELEASED,
    },
    State.CLOSING: {
        Change.CLOSED: State.RELEASED,
        Change.COMMITTED: State.RELEASED,
    },
    State.RELEASED: {},
}


def advance(state: State, change: Change) -> State:
    """The state after ``change``.

    Raises:
        IllegalTransition: the table has no such way.
    """
    try:
        return TABLE[state][change]
    except KeyError:
        raise IllegalTransition(f"{change.value} while {state.value}") from None
