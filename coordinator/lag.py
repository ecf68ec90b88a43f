"""How late the event loop runs, and a clock that leaves out the time in which it did not. Pure.

A timer is due every ``INTERVAL_S``; how late it fires is the loop's lag. What a stalled loop was
sent lies unread until it goes on, so that nobody's silence can be told from the loop's own: budgets
for what others do are kept by ``observed``, which does not advance during a stall.

::

    timer due      fires                    due            fires
    |--------------|........................|==============|.....
    now            a little late            a stall: observed() stands still after TOLERANCE_S
"""

import math
from collections import deque

INTERVAL_S = 0.05
TOLERANCE_S = 0.5  # of a lag, up to which the clock goes on: what a busy machine does to anybody
STALL_S = 0.02  # a later timer counts as a stall
WINDOW_S = 30.0  # in which the largest lag is looked for


class LoopLag:
    """The lag of one event loop, from the first time that ``fired`` is called. Times are monotonic
    seconds."""

    def __init__(self) -> None:
        self.num_stalls = 0  # timers that were later than STALL_S
        self.stalled_s = 0.0  # how late they were, together
        self._due = math.inf
        self._unobserved_s = 0.0
        # (when, lag): only those that no later one exceeds, so the first one is the largest.
        self._lags: deque[tuple[float, float]] = deque()

    def fired(self, now: float) -> None:
        """The timer has fired; it is due again ``INTERVAL_S`` from now."""
        lag_s = max(0.0, now - self._due)
        if lag_s > STALL_S:
            self.num_stalls += 1
            self.stalled_s += lag_s
        self._unobserved_s += max(0.0, lag_s - TOLERANCE_S)
        while self._lags and self._lags[-1][1] <= lag_s:
            self._lags.pop()
        while self._lags and now - self._lags[0][0] > WINDOW_S:
            self._lags.popleft()
        self._lags.append((now, lag_s))
        self._due = now + INTERVAL_S

    def largest(self, now: float, within_s: float = WINDOW_S) -> float:
        """The largest lag of the last ``within_s`` seconds, at most ``WINDOW_S``; that of a timer
        which is overdue right now counts."""
        recent = (lag_s for when, lag_s in self._lags if now - when <= within_s)
        return max(0.0, now - self._due, next(recent, 0.0))

    def observed(self, now: float) -> float:
        """The time of a clock that stands still while the loop stalls. It never goes back."""
        return min(now, self._due + TOLERANCE_S) - self._unobserved_s
