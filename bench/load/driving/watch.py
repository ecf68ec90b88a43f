"""Asks a Baton cluster how it is, once a second, while a run goes on.

It lives in the process that waits for the drivers, never in a driver: no request is sent later
because of it. One question at a time; a second without an answer is a second without a sample, and
nothing is caught up. A server that does not know ``/v1/cluster`` is asked once and never again.
"""

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import httpx

from bench.load.driving.driver import Target
from bench.load.driving.target import headers_of
from bench.load.samples import SAMPLES_FILE, ClusterSample, sample_of

INTERVAL_S = 1.0
TIMEOUT_S = 2.0
MAX_MISSED = 30  # in a row: whoever is gone for so long is not asked any more

OnSample = Callable[[ClusterSample], None]


class Watch:
    """One target's state beside one run.

    Args:
        on_sample: gets every answer.
        interval_s: from one question to the next.
    """

    def __init__(self, target: Target, on_sample: OnSample, interval_s: float = INTERVAL_S) -> None:
        self._target = target
        self._on_sample = on_sample
        self._interval_s = interval_s
        self._client = httpx.AsyncClient(
            base_url=target.url, headers=headers_of(target.api_key), timeout=TIMEOUT_S
        )
        self._start_at = 0.0
        self._is_told = False
        self._num_samples = 0
        self._num_missed = 0

    async def __aenter__(self) -> Self:
        """Whether the target has something to say is found out before the run, not during it."""
        self._is_told = await self._ask() is not None
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    async def follow(self, start_at: float) -> None:
        """Ask from ``start_at`` on, until cancelled."""
        self._start_at = start_at
        number, num_silent = 0, 0
        while self._is_told and num_silent < MAX_MISSED:
            due = start_at + number * self._interval_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            num_silent = 0 if await self._take() else num_silent + 1
            passed = int((time.monotonic() - start_at) / self._interval_s)
            number = max(number, passed) + 1

    async def end(self) -> None:
        """The last sample, of after the last answer."""
        if self._is_told:
            await self._take()

    def described(self) -> dict[str, Any] | None:
        """For the manifest; None where there was nothing to ask."""
        if not self._is_told:
            return None
        return {
            "file": SAMPLES_FILE,
            "interval_s": self._interval_s,
            "num_samples": self._num_samples,
            "num_missed": self._num_missed,
        }

    async def _take(self) -> bool:
        sample = await self._ask()
        if sample is None:
            self._num_missed += 1
            return False
        self._num_samples += 1
        self._on_sample(sample)
        return True

    async def _ask(self) -> ClusterSample | None:
        asked_at = time.monotonic()
        try:
            reply = await self._client.get("/v1/cluster")
        except httpx.HTTPError:
            return None
        if reply.status_code != 200:
            return None
        now = time.monotonic()
        middle_s = (asked_at + now) / 2 - self._start_at
        return sample_of(reply.content, self._target.name, middle_s, now - asked_at)
