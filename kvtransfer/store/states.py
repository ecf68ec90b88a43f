"""The states of what a store takes in, a *deposit*, and of what it gives out, a *loan*.

::

    deposit  QUEUED --grant--> OPENING --opened--> RESERVED --committed--> STORING --stored--> GONE
             QUEUED --known--> STORING       QUEUED, STORING --end--> GONE
             OPENING, RESERVED --close--> CLOSING --closed or committed--> GONE

    loan     QUEUED --load--> LOADING --loaded--> SERVING --closed--> GONE
             QUEUED, LOADING --end--> GONE

A deposit has no block of its own from STORING on: what it brought is the store's, and being written
behind it. A loan in LOADING that is not wanted any more ends when the disk has answered, for bytes
land until then.
"""

import enum

from protocol.errors import IllegalTransition


class State(enum.Enum):
    QUEUED = "queued"  # waits for room in the store's memory
    OPENING = "opening"
    RESERVED = "reserved"  # a peer may write into its blocks
    STORING = "storing"
    CLOSING = "closing"
    LOADING = "loading"
    SERVING = "serving"  # a peer may read from its blocks
    GONE = "gone"


class Change(enum.Enum):
    GRANT = "grant"
    KNOWN = "known"
    OPENED = "opened"
    COMMITTED = "committed"
    STORED = "stored"
    CLOSE = "close"
    CLOSED = "closed"
    LOAD = "load"
    LOADED = "loaded"
    END = "end"


DEPOSIT: dict[tuple[State, Change], State] = {
    (State.QUEUED, Change.GRANT): State.OPENING,
    (State.QUEUED, Change.KNOWN): State.STORING,
    (State.QUEUED, Change.END): State.GONE,
    (State.OPENING, Change.OPENED): State.RESERVED,
    (State.OPENING, Change.CLOSE): State.CLOSING,
    (State.RESERVED, Change.COMMITTED): State.STORING,
    (State.RESERVED, Change.CLOSE): State.CLOSING,
    (State.STORING, Change.STORED): State.GONE,
    (State.STORING, Change.END): State.GONE,
    (State.CLOSING, Change.CLOSED): State.GONE,
    (State.CLOSING, Change.COMMITTED): State.GONE,
}

LOAN: dict[tuple[State, Change], State] = {
    (State.QUEUED, Change.LOAD): State.LOADING,
    (State.QUEUED, Change.END): State.GONE,
    (State.LOADING, Change.LOADED): State.SERVING,
    (State.LOADING, Change.END): State.GONE,
    (State.SERVING, Change.CLOSED): State.GONE,
}


def advance(table: dict[tuple[State, Change], State], state: State, change: Change) -> State:
    """The state after ``change``.

    Raises:
        IllegalTransition: the table has no such way.
    """
    following = table.get((state, change))
    if following is None:
        raise IllegalTransition(f"{change.value} while {state.value}")
    return following
