"""When the coordinator's garbage is collected: not in the middle of a burst.

A full collection looks at every object that may be part of a cycle, in one go: with thousands of
requests that is a tenth of a second and more in which the loop stands still. What is there after
the start is set apart for good, young garbage is collected as ever, and a full collection waits for
a moment without requests. Then the memory that a burst has left free is given back to the system.
"""

import asyncio
import ctypes
import gc
import sys
import time
from collections.abc import Callable

YOUNG, MIDDLE, NEVER = 5_000, 20, 1 << 30  # CPython's thresholds
LOOK_S = 5.0
MAX_WAIT_S = 600.0  # a server that always has requests collects nevertheless


async def collect_in_quiet(num_active: Callable[[], int]) -> None:
    """Look after it for as long as the loop runs; never returns.

    Args:
        num_active: requests that are at work.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, NEVER)
    collected_at, was_busy = time.monotonic(), True
    while True:
        await asyncio.sleep(LOOK_S)
        is_quiet = num_active() == 0
        if (is_quiet and was_busy) or time.monotonic() - collected_at > MAX_WAIT_S:
            gc.collect()
            _give_back()
            collected_at = time.monotonic()
        was_busy = not is_quiet


def _give_back() -> None:
    """Only glibc's allocator has to be told."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
