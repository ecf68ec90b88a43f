"""When to give up a silent process: soon if it is idle, late if it works. Pure.

A process is heard when it writes a line. A silent one is looked at from outside: has it used a
processor since the last look, or is one of its threads running or reading a disk right now? Work
puts off the end, at most until ``stall_s`` after the last line:

::

    line                 looks...
    |----------|----|----|----|----|
    heard           worked         given up: worked + silent_s, or heard + stall_s

A process does not work when it is stopped, waits for a lock that is never released, or has nothing
to do.
"""

from dataclasses import dataclass

LOOK_AFTER_S = 1.5  # lines come each second, or a little later
LOOK_INTERVAL_S = 1.0
WORK_SHARE = 0.1  # of one processor, from which on it works


@dataclass(frozen=True, slots=True)
class Vitals:
    """A look at a process from outside."""

    cpu_s: float  # that its threads have used since they began
    is_running: bool  # one of its threads runs, is ready to, or reads a disk


class Silence:
    """The silence of one process. Times are monotonic seconds.

    Args:
        silent_s: how long it may be silent and idle.
        stall_s: how long it may be silent.
        now: when it was heard last.
    """

    def __init__(self, silent_s: float, stall_s: float, now: float) -> None:
        self._silent_s = silent_s
        self._stall_s = stall_s
        self.heard(now)

    def heard(self, now: float) -> None:
        """It has written a line."""
        self._heard = self._worked = self._look_at = now
        self._look_at += min(LOOK_AFTER_S, self._silent_s)
        self._last: tuple[float, Vitals] | None = None

    def excuse(self, pause_s: float) -> None:
        """Do not count ``pause_s`` seconds, in which this process was paused itself."""
        self._heard += pause_s
        self._worked += pause_s
        self._look_at += pause_s
        self._last = None

    @property
    def look_at(self) -> float:
        """When to look at it next."""
        return self._look_at

    def look(self, vitals: Vitals | None, now: float) -> str | None:
        """Take in its vitals, None if they cannot be read.

        Returns:
            The reason to give it up now, or None.
        """
        if vitals is not None and (vitals.is_running or self._has_worked(vitals, now)):
            self._worked = now
        self._last = None if vitals is None else (now, vitals)
        until = min(self._worked + self._silent_s, self._heard + self._stall_s)
        if now < until:
            self._look_at = min(now + LOOK_INTERVAL_S, until)
            return None
        works = "" if now - self._worked >= self._silent_s else ", though it works"
        return f"it was silent for {now - self._heard:.0f} s{works}"

    def _has_worked(self, vitals: Vitals, now: float) -> bool:
        if self._last is None:
            return False
        then, last = self._last
        return vitals.cpu_s - last.cpu_s > WORK_SHARE * (now - then)
