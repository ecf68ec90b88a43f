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


class RequestState(enum.Enum):
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


TABLE: dict[tuple[RequestState, RequestEvent], RequestState] = {
    (RequestState.WAITING, RequestEvent.ADMIT): RequestState.RUNNING,
    (RequestState.WAITING, RequestEvent.FETCH): RequestState.FETCHING,
    (RequestState.WAITING, RequestEvent.DROP): RequestState.RELEASED,
    (RequestState.FETCHING, RequestEvent.FETCHED): RequestState.RUNNING,
    (RequestState.FETCHING, RequestEvent.GIVE_UP): RequestState.RETURNING,
    (RequestState.FETCHING, RequestEvent.CLOSE): RequestState.CLOSING,
    (RequestState.RETURNING, RequestEvent.CLOSED): RequestState.WAITING,
    (RequestState.RETURNING, RequestEvent.CLOSE): RequestState.CLOSING,
    (RequestState.RUNNING, RequestEvent.COMPUTED): RequestState.HANDING_OVER,
    (RequestState.RUNNING, RequestEvent.CLOSE): RequestState.CLOSING,
    (RequestState.HANDING_OVER, RequestEvent.CLOSED): RequestState.RELEASED,
    (RequestState.HANDING_OVER, RequestEvent.CLOSE): RequestState.CLOSING,
    (RequestState.CLOSING, RequestEvent.CLOSED): RequestState.RELEASED,
}
