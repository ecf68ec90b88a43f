"""How long a call may take, and when it is tried again. Pure but for the clock that is given."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from coordinator.client.errors import BatonAPIError, BatonConnectionError, ClientError, WaitTimeout

Clock = Callable[[], float]
MIN_JITTER = 0.5


@dataclass(frozen=True, slots=True)
class Retry:
    """Only what cannot take effect twice is tried again: reads, and what carries a key.

    Args:
        max_attempts: of one call, with the first.
        first_delay_s: doubled each time, and shortened at random by up to a half.
        max_delay_s: neither backoff nor a server's Retry-After makes it longer.
    """

    max_attempts: int = 3
    first_delay_s: float = 0.25
    max_delay_s: float = 8.0

    def delay_s(self, number: int, error: ClientError, random: Random) -> float | None:
        """The pause after the ``number``-th failure in a row; None: it is final."""
        if number >= self.max_attempts or not is_temporary(error):
            return None
        return self.pause_s(number, error, random)

    def pause_s(self, number: int, error: ClientError, random: Random) -> float:
        """The same, however many failures there were."""
        delay = self.first_delay_s * 2.0 ** min(number - 1, 16)
        delay *= random.uniform(MIN_JITTER, 1.0)
        asked = error.retry_after if isinstance(error, BatonAPIError) else None
        return min(self.max_delay_s, max(delay, asked or 0.0))


def is_temporary(error: ClientError) -> bool:
    """Whether the same call may succeed later."""
    if isinstance(error, BatonAPIError):
        return error.is_temporary
    return isinstance(error, BatonConnectionError)


class Budget:
    """The time that a call has, from now on.

    Args:
        seconds: all of it.
        what: is being done, for the message of the timeout.
        clock: monotonic seconds.
    """

    def __init__(self, seconds: float, what: str, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self.started = clock()
        self._seconds = seconds
        self._what = what

    @property
    def left_s(self) -> float:
        return self._seconds - (self.clock() - self.started)

    def check(self) -> None:
        """
        Raises:
            WaitTimeout: it is spent.
        """
        if self.left_s <= 0:
            raise self.timeout()

    def timeout(self) -> WaitTimeout:
        return WaitTimeout(f"{self._what}: not done after {self._seconds:.0f} s")


class Patience:
    """How failures are borne by a call that outlives connections, and restarts of the server.

    A server that has never answered is given up like any other call's; one that has is waited for
    as long as the budget lasts.
    """

    def __init__(self, retry: Retry, budget: Budget, random: Random) -> None:
        self.budget = budget
        self._retry = retry
        self._random = random
        self._has_answered = False
        self._num_failures = 0

    def answered(self) -> None:
        """The server is there."""
        self._has_answered = True

    def got_on(self) -> None:
        """Something came of it: the next failure is a first one."""
        self._has_answered = True
        self._num_failures = 0

    def delay_s(self, error: ClientError) -> float:
        """The pause after a failure.

        Raises:
            ClientError: ``error``, which is final.
            WaitTimeout: the budget is spent.
        """
        self._num_failures += 1
        is_hopeless = not self._has_answered and self._num_failures >= self._retry.max_attempts
        if is_hopeless or not is_temporary(error):
            raise error
        delay = self._retry.pause_s(self._num_failures, error, self._random)
        if delay >= self.budget.left_s:
            raise self.budget.timeout() from error
        return delay
