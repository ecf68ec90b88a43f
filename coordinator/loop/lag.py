"""How late the event loop runs, and a clock that leaves out the time in which it did not. Pure.

A timer is due every ``INTERVAL_S``; how late it fires is the loop's lag. A machine that has no core
to spare makes anybody late: a lag less what the loop's thread has waited for a core is its own, a
*step*. What a stalled loop was sent lies unread until it goes on, so that nobody's silence can be
told from the loop's own: budgets for what others do are kept by ``observed``, which does not
advance during a stall.

::

    timer due      fires                    due            fires
    |--------------|........................|==============|.....
    now            a little late            a stall: observed() stands still after TOLERANCE_S
"""

import math
from collections import deque

INTERVAL_S = 0.01  # so much of a step may be missed, if a core was waited for before it
TOLERANCE_S = 0.5  # of a lag, up to which the clock goes on: what a busy machine does to anybody
STALL_S = 0.02  # a later timer counts as a stall
WINDOW_S = 30.0  # in which the largest lag is looked for


class _Largest:
    """The largest of the values of the last ``WINDOW_S``."""

    def __init__(self) -> None:
        # (when, value): only those that no later one exceeds, so the first one is the largest.
        self._values: deque[tuple[float, float]] = deque()

    def add(self, now: float, value: float) -> None:
        while self._values and self._values[-1][1] <= value:
            self._values.pop()
        while self._values and now - self._values[0][0] > WINDOW_S:
            self._values.popleft()
        self._values.append((now, value))

    def lately(self, now: float, within_s: float) -> float:
        """0 when there is none."""
        return next((value for when, value in self._values if now - when <= within_s), 0.0)


class LoopLag:
    """The lag of one event loop, from the first time that ``fired`` is called. Times are monotonic
    seconds."""

    def __init__(self) -> None:
        self.num_stalls = 0  # timers that were later than STALL_S
        self.stalled_s = 0.0  # how late they were, together
        self._due = math.inf
        self._unobserved_s = 0.0
        self._waited_s = 0.0
        self._lags, self._steps = _Largest(), _Largest()

    def fired(self, now: float, waited_s: float = 0.0) -> None:
        """The timer has fired; it is due again ``INTERVAL_S`` from now.

        Args:
            now: monotonic seconds.
            waited_s: what the loop's thread has waited for a core so far.
        """
        lag_s = max(0.0, now - self._due)
        if lag_s > STALL_S:
            self.num_stalls += 1
            self.stalled_s += lag_s
        self._unobserved_s += max(0.0, lag_s - TOLERANCE_S)
        self._lags.add(now, lag_s)
        self._steps.add(now, max(0.0, lag_s - (waited_s - self._waited_s)))
        self._due, self._waited_s = now + INTERVAL_S, waited_s

    def largest(self, now: float, within_s: float = WINDOW_S) -> float:
        """The largest lag of the last ``within_s`` seconds, at most ``WINDOW_S``; that of a timer
        which is overdue right now counts."""
        return max(0.0, now - self._due, self._lags.lately(now, within_s))

    def longest_step_s(self, now: float) -> float:
        """The longest of the last ``WINDOW_S`` seconds."""
        return self._steps.lately(now, WINDOW_S)

    def observed(self, now: float) -> float:
        """The time of a clock that stands still while the loop stalls. It never goes back."""
        return min(now, self._due + TOLERANCE_S) - self._unobserved_s
