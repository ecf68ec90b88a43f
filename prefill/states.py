"""The states of a request in a prefill pool, and the only ways from one to another.

::

    WAITING --admit--> RUNNING --computed--> HANDING_OVER --closed--> RELEASED
    WAITING --fetch--> FETCHING --fetched--> RUNNING
    FETCHING --give_up--> RETURNING --closed--> WAITING
    FETCHING, RETURNING, RUNNING, HANDING_OVER --close--> CLOSING --closed--> RELEASED
    WAITING --drop--> RELEASED

WAITING holds nothing. A request is admitted together with its first chunk and with all blocks of
its prompt, so from RUNNING on a decode pool may read from them; they are given back on ``closed``
alone, when no read is or will be in flight. FETCHING has all its blocks as well, and waits for the
KV of some to come from the decode pool. If that fails it is RETURNING until nothing can land in
them any more, gives them back and is WAITING once again.
"""

import enum


class State(enum.Enum):
    """Where a request stands."""

    WAITING = "waiting"
    FETCHING = "fetching"  # a prefix of it is being read from its decode pool
    RETURNING = "returning"  # the fetch has failed, but a read may still be in flight
    RUNNING = "running"
    HANDING_OVER = "handing_over"  # computed, its blocks are still being read
    CLOSING = "closing"  # given up, but a read may still be in flight
    RELEASED = "released"


class RequestEvent(enum.Enum):
    """What can happen to a request."""

    ADMIT = "admit"
    FETCH = "fetch"
    FETCHED = "fetched"
    GIVE_UP = "give_up"
    COMPUTED = "computed"
    CLOSE = "close"
    CLOSED = "closed"
    DROP = "drop"


TABLE: dict[tuple[State, RequestEvent], State] = {
    (State.WAITING, RequestEvent.ADMIT): State.RUNNING,
    (State.WAITING, RequestEvent.FETCH): State.FETCHING,
    (State.WAITING, RequestEvent.DROP): State.RELEASED,
    (State.FETCHING, RequestEvent.FETCHED): State.RUNNING,
    (State.FETCHING, RequestEvent.GIVE_UP): State.RETURNING,
    (State.FETCHING, RequestEvent.CLOSE): State.CLOSING,
    (State.RETURNING, RequestEvent.CLOSED): State.WAITING,
    (State.RETURNING, RequestEvent.CLOSE): State.CLOSING,
    (State.RUNNING, RequestEvent.COMPUTED): State.HANDING_OVER,
    (State.RUNNING, RequestEvent.CLOSE): State.CLOSING,
    (State.HANDING_OVER, RequestEvent.CLOSED): State.RELEASED,
    (State.HANDING_OVER, RequestEvent.CLOSE): State.CLOSING,
    (State.CLOSING, RequestEvent.CLOSED): State.RELEASED,
}
