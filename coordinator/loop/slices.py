"""Long work of the event loop, done a slice at a time between everything else.

What walks over thousands of requests is a generator that yields between two of them. It is resumed
for a few milliseconds, then whatever else waits in the loop has its turn. Things change meanwhile:
who writes such a generator looks again at each request when it comes to it.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterator

import msgspec

from protocol.messages import CacheUpdate, ToCoordinator, Tokens

SLICE_S = 0.004
PART_TOKENS = 256  # of a message, that are handed out in one go
PART_HASHES = 2048


class Pace:
    """Says when a loop of one task has had its slice, and lets the others go first."""

    def __init__(self, slice_s: float = SLICE_S) -> None:
        self._slice_s = slice_s
        self._until = time.monotonic() + slice_s

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._until

    def begin(self) -> None:
        self._until = time.monotonic() + self._slice_s

    async def breathe(self) -> None:
        """Go on at once while there is something left of the slice."""
        if self.is_over:
            await asyncio.sleep(0)
            self.begin()


class Slices:
    """Generators in the order in which they came; each is run to its end."""

    def __init__(self) -> None:
        self._waiting: deque[Iterator[None]] = deque()
        self._has_work = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def add(self, work: Iterator[None]) -> None:
        """Do it: at once as far as a slice goes, the rest in ``run``."""
        self._waiting.append(work)
        if len(self._waiting) == 1:
            self._do_a_slice()
        if self._waiting:
            self._is_idle.clear()
            self._has_work.set()

    async def run(self) -> None:
        """Go on with what is left; never returns."""
        while True:
            await self._has_work.wait()
            await asyncio.sleep(0)
            self._do_a_slice()
            if not self._waiting:
                self._has_work.clear()
                self._is_idle.set()

    async def settled(self) -> None:
        """Wait until nothing is left."""
        await self._is_idle.wait()

    def _do_a_slice(self) -> None:
        pace = Pace()
        while self._waiting and not pace.is_over:
            if next(self._waiting[0], self) is self:
                self._waiting.popleft()


def parts_of(message: ToCoordinator) -> Iterator[ToCoordinator]:
    """A message that is too long for one go, as several that say the same in this order."""
    if isinstance(message, Tokens) and len(message.tokens) > PART_TOKENS:
        for start in range(0, len(message.tokens), PART_TOKENS):
            tokens = message.tokens[start : start + PART_TOKENS]
            yield msgspec.structs.replace(message, tokens=tokens)
    elif isinstance(message, CacheUpdate):
        stored, evicted = message.stored, message.evicted
        for start in range(0, max(len(evicted), 1), PART_HASHES):
            is_last = start + PART_HASHES >= len(evicted)
            yield msgspec.structs.replace(
                message,
                stored=stored[:PART_HASHES] if is_last else (),
                evicted=evicted[start : start + PART_HASHES],
            )
        for start in range(PART_HASHES, len(stored), PART_HASHES):
            part = stored[start : start + PART_HASHES]
            yield msgspec.structs.replace(message, stored=part, evicted=())
    else:
        yield message
