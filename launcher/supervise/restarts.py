"""The limits on restarts of a gang: how often, and how soon. Pure."""

from collections import deque
from dataclasses import dataclass

from protocol.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """At most ``max_restarts`` in any ``window_s``, each after twice the wait of the one before.

    Raises:
        ConfigError: a value that makes no sense.
    """

    max_restarts: int = 5
    window_s: float = 600.0
    backoff_s: float = 0.25
    max_backoff_s: float = 30.0

    def __post_init__(self) -> None:
        if self.max_restarts < 0 or self.window_s <= 0 or self.backoff_s < 0:
            raise ConfigError(
                f"restart_budget {self.max_restarts}, restart_window_s {self.window_s}, "
                f"restart_backoff_s {self.backoff_s}: none can be negative, and the window not 0"
            )


class RestartBudget:
    """The restarts that one gang has left."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._taken: deque[float] = deque()

    def take(self, now: float) -> float | None:
        """Seconds to wait before the next start, or None when there is none left."""
        policy = self._policy
        while self._taken and now - self._taken[0] > policy.window_s:
            self._taken.popleft()
        if len(self._taken) >= policy.max_restarts:
            return None
        wait_s = policy.backoff_s * 2.0 ** len(self._taken)
        self._taken.append(now)
        return min(wait_s, policy.max_backoff_s)
