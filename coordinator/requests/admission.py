"""Who is let in, and how long the others should wait. Pure; time comes as an argument.

1. All tenants together may have ``max_requests`` sequences at one time, waiting ones included.
   Beyond that everybody is refused with 503.
2. While there are several keys, each may have a share of them, so that no single one takes all the
   room. Beyond that its holder is refused with 429; a tenant who is alone may have it all.
3. Who is refused is told when there should be room: the rate at which sequences end says how long
   it takes until as many have ended as were refused before it, and it needs.
"""

import math
from collections import deque
from collections.abc import Callable

from coordinator.config import Limits
from protocol.errors import RequestError

MAX_RETRY_AFTER_S = 60.0
FIRST_RETRY_AFTER_S = 5.0  # before anything has ended, so that nothing is known
RATE_WINDOW_S = 30.0
MANY, RUSH_WINDOW_S = 5, 10.0  # requests, and the time within which so many are a rush


class Departures:
    """The rate at which sequences end, lately; whatever ended longer ago counts less."""

    def __init__(self, window_s: float = RATE_WINDOW_S) -> None:
        self._window_s = window_s
        self._weight = 0.0
        self._first: float | None = None
        self._last = 0.0

    def ended(self, now: float) -> None:
        """One has."""
        if self._first is None:
            self._first = self._last = now
        self._weight = self._weight * self._faded(now) + 1.0
        self._last = now

    def per_s(self, now: float) -> float:
        """Sequences per second; 0 when none has ended yet."""
        if self._first is None:
            return 0.0
        seen = 1.0 - math.exp(-max(now - self._first, 1.0) / self._window_s)
        return self._weight * self._faded(now) / (self._window_s * seen)

    def _faded(self, now: float) -> float:
        return math.exp(-(now - self._last) / self._window_s)


class Queue:
    """Those who were told to come back, as if they stood in line for what becomes free."""

    def __init__(self) -> None:
        self._until = 0.0  # when the last of them will have found room

    def retry_after_s(self, num_needed: int, per_s: float, now: float) -> int:
        """Whole seconds until there should be room for one more who needs so much."""
        if per_s <= 0.0:
            return math.ceil(FIRST_RETRY_AFTER_S)
        self._until = max(self._until, now) + num_needed / per_s
        wait_s = min(self._until - now, MAX_RETRY_AFTER_S)
        self._until = now + wait_s  # whoever came in vain has gone away
        return max(1, math.ceil(wait_s))


class Admission:
    """The bounds.

    Args:
        limits: how many.
        num_tenants: who share them at the moment.
    """

    def __init__(self, limits: Limits, num_tenants: Callable[[], int]) -> None:
        self._num_tenants = num_tenants
        self._limits = limits
        self._departures = Departures()
        self._queue = Queue()
        self._queues: dict[str, Queue] = {}  # as many as there are keys
        self._closed: RequestError | None = None

    def close(self, error: RequestError) -> None:
        """Nobody is let in any more."""
        self._closed = error

    def ended(self, now: float) -> None:
        """Nothing is kept of a sequence any more."""
        self._departures.ended(now)

    def check(self, tenant: str, num: int, held: tuple[int, int], now: float) -> None:
        """Whether a tenant may have so many sequences more.

        Args:
            held: what the tenant has, and what all have together.

        Raises:
            RequestError: 503 while there is no room, 429 beyond its share; 400 for what there never
                will be room for.
        """
        if self._closed is not None:
            raise self._closed
        num_own, num_all = held
        most, most_own = (
            self._limits.max_requests,
            self._limits.tenant_requests(self._num_tenants()),
        )
        if num > most_own:
            raise RequestError(
                f"{num} sequences, at most {most_own} are served at one time",
                code="invalid_value",
                param="n",
            )
        per_s = self._departures.per_s(now)
        if num_all + num > most:
            wait_s = self._queue.retry_after_s(num_all + num - most, per_s, now)
            raise RequestError(
                f"too many requests are waiting: there should be room in {wait_s} s",
                code="overloaded",
                status=503,
                retry_after_s=wait_s,
            )
        if num_own + num > most_own:
            queue = self._queues.setdefault(tenant, Queue())
            own_per_s = per_s * num_own / max(num_all, 1)
            wait_s = queue.retry_after_s(num_own + num - most_own, own_per_s, now)
            raise RequestError(
                f"{num_own} of this key's requests are here, at most {most_own} are taken "
                f"at one time: there should be room in {wait_s} s",
                code="too_many_requests",
                status=429,
                retry_after_s=wait_s,
            )


class Rush:
    """How often requests come for which somebody waits: work in the background makes way for many.

    A segment of a document in small chunks takes about twice as long, and lets a request that comes
    meanwhile begin after a small chunk instead of a whole one. That is worth it where requests keep
    coming; few of them, each of which waits for one chunk at most, do not slow a document down.
    """

    def __init__(self) -> None:
        self._arrivals: deque[float] = deque(maxlen=MANY)

    def arrived(self, now: float) -> None:
        """A request was submitted for which somebody waits."""
        self._arrivals.append(now)

    def is_on(self, now: float) -> bool:
        """Whether MANY have come within RUSH_WINDOW_S."""
        return len(self._arrivals) == MANY and now - self._arrivals[0] < RUSH_WINDOW_S
