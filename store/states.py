"""The states of what a store takes in, an *offload*, and of what it gives out, a *onboarding*.

::

    offload  QUEUED --grant--> OPENING --opened--> RESERVED --committed--> STORING --stored--> GONE
             QUEUED --known--> STORING       QUEUED, STORING --end--> GONE
             OPENING, RESERVED --close--> CLOSING --closed or committed--> GONE

    onboarding     QUEUED --load--> LOADING --loaded--> SERVING --closed--> GONE
             QUEUED, LOADING --end--> GONE

From STORING on, an offload owns no block: the blocks are the store's and are written behind it. An
onboarding that is given up in LOADING ends only when the disk has answered: until then bytes land.
"""

import enum


class StoreState(enum.Enum):
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


OFFLOAD: dict[tuple[StoreState, StoreEvent], StoreState] = {
    (StoreState.QUEUED, StoreEvent.GRANT): StoreState.OPENING,
    (StoreState.QUEUED, StoreEvent.KNOWN): StoreState.STORING,
    (StoreState.QUEUED, StoreEvent.END): StoreState.GONE,
    (StoreState.OPENING, StoreEvent.OPENED): StoreState.RESERVED,
    (StoreState.OPENING, StoreEvent.CLOSE): StoreState.CLOSING,
    (StoreState.RESERVED, StoreEvent.COMMITTED): StoreState.STORING,
    (StoreState.RESERVED, StoreEvent.CLOSE): StoreState.CLOSING,
    (StoreState.STORING, StoreEvent.STORED): StoreState.GONE,
    (StoreState.STORING, StoreEvent.END): StoreState.GONE,
    (StoreState.CLOSING, StoreEvent.CLOSED): StoreState.GONE,
    (StoreState.CLOSING, StoreEvent.COMMITTED): StoreState.GONE,
}

ONBOARDING: dict[tuple[StoreState, StoreEvent], StoreState] = {
    (StoreState.QUEUED, StoreEvent.LOAD): StoreState.LOADING,
    (StoreState.QUEUED, StoreEvent.END): StoreState.GONE,
    (StoreState.LOADING, StoreEvent.LOADED): StoreState.SERVING,
    (StoreState.LOADING, StoreEvent.END): StoreState.GONE,
    (StoreState.SERVING, StoreEvent.CLOSED): StoreState.GONE,
}
