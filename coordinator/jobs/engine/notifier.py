"""Waiting for news of jobs: who waits is woken at each change, and all of them are counted."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from coordinator.config import JobLimits
from protocol.errors import RequestError

RETRY_AFTER_S = 5  # a watcher ends when there is news, or when it is tired of waiting: soon


class ChangeNotifier:
    """Wakes whoever waits for news of a job."""

    def __init__(self) -> None:
        self.is_closed = False
        self._waiting: dict[str, asyncio.Event] = {}

    @property
    def num_waiting(self) -> int:
        """Jobs of which somebody waits for news."""
        return len(self._waiting)

    def ticket(self, job_id: str) -> asyncio.Event:
        """An event that the next news sets. Take it before looking, so that none is missed."""
        return self._waiting.setdefault(job_id, asyncio.Event())

    def notify(self, job_id: str) -> None:
        waiting = self._waiting.pop(job_id, None)
        if waiting is not None:
            waiting.set()

    def close(self) -> None:
        """Wake everybody: there will be no more news."""
        self.is_closed = True
        for job_id in list(self._waiting):
            self.notify(job_id)


class Watchers:
    """The requests that wait for news. Each holds a connection, so their number is bounded.

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
        """Refuse one more if there is no room for it.

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
        """Count one more while the block runs."""
        self._watching[tenant] += 1
        try:
            yield
        finally:
            self._watching[tenant] -= 1
            if not self._watching[tenant]:
                del self._watching[tenant]
