"""Room for what has the lowest priority: a few at a time, and only while others ask for little."""

import asyncio
from collections.abc import Callable

LOOK_S = 0.05  # the load is many requests' doing: it is looked at, nobody tells of it


class Slots:
    """Slots, granted in the order of asking.

    Args:
        count: how many there are.
        is_quiet: whether the cluster serves, and others leave room.
    """

    def __init__(self, count: int, is_quiet: Callable[[], bool]) -> None:
        self._free = asyncio.Semaphore(count)
        self._is_quiet = is_quiet

    async def acquire(self) -> None:
        """Wait for a slot, then for a quiet moment. To be released by whoever gets it."""
        await self._free.acquire()
        try:
            while not self._is_quiet():  # noqa: ASYNC110 - see LOOK_S
                await asyncio.sleep(LOOK_S)
        except asyncio.CancelledError:
            self._free.release()
            raise

    def release(self) -> None:
        """Give back a slot."""
        self._free.release()
