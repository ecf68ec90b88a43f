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


class State(enum.Enum):
    QUEUED = "queued"  # waits for room in the store's memory
    OPENING = "opening"
    RESERVED = "reserved"  # a peer may write into its blocks
    STORING = "storing"
    CLOSING = "closing"
    LOADING = "loading"
    SERVING = "serving"  # a peer may read from its blocks
    GONE = "gone"


class StoreEvent(enum.Enum):
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


DEPOSIT: dict[tuple[State, StoreEvent], State] = {
    (State.QUEUED, StoreEvent.GRANT): State.OPENING,
    (State.QUEUED, StoreEvent.KNOWN): State.STORING,
    (State.QUEUED, StoreEvent.END): State.GONE,
    (State.OPENING, StoreEvent.OPENED): State.RESERVED,
    (State.OPENING, StoreEvent.CLOSE): State.CLOSING,
    (State.RESERVED, StoreEvent.COMMITTED): State.STORING,
    (State.RESERVED, StoreEvent.CLOSE): State.CLOSING,
    (State.STORING, StoreEvent.STORED): State.GONE,
    (State.STORING, StoreEvent.END): State.GONE,
    (State.CLOSING, StoreEvent.CLOSED): State.GONE,
    (State.CLOSING, StoreEvent.COMMITTED): State.GONE,
}

LOAN: dict[tuple[State, StoreEvent], State] = {
    (State.QUEUED, StoreEvent.LOAD): State.LOADING,
    (State.QUEUED, StoreEvent.END): State.GONE,
    (State.LOADING, StoreEvent.LOADED): State.SERVING,
    (State.LOADING, StoreEvent.END): State.GONE,
    (State.SERVING, StoreEvent.CLOSED): State.GONE,
}
