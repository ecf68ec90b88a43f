"""The states of a request in a prefill pool, and the only ways from one to another.

::

    WAITING --admit--> RUNNING --computed--> HANDING_OVER --closed--> RELEASED
       |                  |                       |                      ^
       |                  +--close--> CLOSING <---+--close               |
       |                                 +------------closed-------------+
       +--drop-----------------------------------------------------------+

WAITING holds nothing. A request is admitted together with its first chunk and with all blocks of
its prompt, so from RUNNING on a decode pool may read from them; they are given back on ``closed``
alone, when no read is or will be in flight.
"""

import enum

from protocol.errors import IllegalTransition


class State(enum.Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    HANDING_OVER = "handing_over"  # computed, its blocks are still being read
    CLOSING = "closing"  # given up, but a read may still be in flight
    RELEASED = "released"


class Change(enum.Enum):
    """What can happen to a request."""

    ADMIT = "admit"
    COMPUTED = "computed"
    CLOSE = "close"
    CLOSED = "closed"
    DROP = "drop"


TABLE: dict[State, dict[Change, State]] = {
    State.WAITING: {Change.ADMIT: State.RUNNING, Change.DROP: State.RELEASED},
    State.RUNNING: {Change.COMPUTED: State.HANDING_OVER, Change.CLOSE: State.CLOSING},
    State.HANDING_OVER: {Change.CLOSED: State.RELEASED, Change.CLOSE: State.CLOSING},
    State.CLOSING: {Change.CLOSED: State.RELEASED},
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
