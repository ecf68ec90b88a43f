"""Time-outs for what others owe us, in which only time counts that the event loop ran.

A loop that goes on after a stall fires its timers before it reads what has come meanwhile. So a
time-out is a row of short timers, and one that fires late counts for nothing. They differ in
length, or those of a thousand connections that came together would be due in one pass for ever.
"""

import asyncio
import random
from collections.abc import Callable
from types import TracebackType

SLICE_S = 0.5


class Countdown:
    """Calls back once, after ``seconds`` in which the loop ran, unless it is cancelled."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, seconds: float, callback: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._left_s = seconds
        self._total_s = seconds
        self._callback = callback
        self._start()

    def _start(self) -> None:
        slice_s = max(0.0, min(self._left_s, SLICE_S * random.uniform(0.5, 1.0)))
        self._began = self._loop.time()
        self._handle = self._loop.call_later(slice_s, self._fired, slice_s)

    def _fired(self, slice_s: float) -> None:
        if self._loop.time() - self._began <= slice_s + SLICE_S:
            self._left_s -= slice_s
        if self._left_s > 0:
            self._start()
        else:
            self._callback()

    @property
    def spent_s(self) -> float:
        """What has counted so far."""
        return self._total_s - self._left_s + min(SLICE_S, self._loop.time() - self._began)

    def cancel(self) -> None:
        """Idempotent. What would be called back may hold us: no cycle is left for the collector."""
        self._handle.cancel()
        self._callback = _nothing


def _nothing() -> None:
    pass


class patient:
    """``async with patient(seconds)``: as ``asyncio.timeout``, for what somebody else is to do.

    Raises:
        TimeoutError: it took longer, on leaving.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timeout = asyncio.timeout(None)

    @property
    def spent_s(self) -> float:
        """What has counted so far."""
        return self._countdown.spent_s

    async def __aenter__(self) -> "patient":
        loop = asyncio.get_running_loop()
        await self._timeout.__aenter__()
        self._countdown = Countdown(
            loop, self._seconds, lambda: self._timeout.reschedule(loop.time())
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._countdown.cancel()
        await self._timeout.__aexit__(kind, error, trace)
