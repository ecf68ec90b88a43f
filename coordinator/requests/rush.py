"""How often requests come for which somebody waits: what nobody waits for makes way for many. Pure.

A segment of a document in small chunks takes about twice as long, and lets a request that comes
meanwhile begin after a small chunk instead of a whole one. That is worth it where requests keep
coming; few of them, each of which waits for one chunk at most, do not slow a document down.
"""

from collections import deque

MANY = 5  # requests
WINDOW_S = 10.0  # within which so many are a rush


class Rush:
    """Of the requests of a cluster. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._arrivals: deque[float] = deque(maxlen=MANY)

    def arrived(self, now: float) -> None:
        """A request was submitted for which somebody waits."""
        self._arrivals.append(now)

    def is_on(self, now: float) -> bool:
        """Whether MANY have come within WINDOW_S."""
        return len(self._arrivals) == MANY and now - self._arrivals[0] < WINDOW_S
