"""Who waits for news of documents: each holds a connection, so they are counted. Pure."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from coordinator.config import JobLimits
from protocol.errors import RequestError

RETRY_AFTER_S = 5  # one ends when there is news, or when it is tired of waiting: soon


class Watchers:
    """All of them.

    Args:
        limits: how many there may be.
    """

    def __init__(self, limits: JobLimits) -> None:
        self._limits = limits
        self._watching: Counter[str] = Counter()

    @property
    def num_watching(self) -> int:
        return self._watching.total()

    def check(self, tenant: str) -> None:
        """Whether there is room for one more.

        Raises:
            RequestError: ``too_many_watchers``.
        """
        own, everybody = self._watching[tenant], self.num_watching
        is_own = own >= self._limits.max_tenant_watchers
        if is_own or everybody >= self._limits.max_watchers:
            raise RequestError(
                f"{own if is_own else everybody} requests wait for news of documents already",
                code="too_many_watchers",
                status=429 if is_own else 503,
                retry_after_s=RETRY_AFTER_S,
            )

    @contextmanager
    def watching(self, tenant: str) -> Iterator[None]:
        """One more, for the length of a block."""
        self._watching[tenant] += 1
        try:
            yield
        finally:
            self._watching[tenant] -= 1
            if not self._watching[tenant]:
                del self._watching[tenant]
