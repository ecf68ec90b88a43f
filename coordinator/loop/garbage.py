"""When the coordinator's garbage is collected: not in the middle of a burst.

A full collection looks at every object that may be part of a cycle, in one go: with thousands of
requests that is a fifth of a second in which the loop stands still. What is there after the start
is set apart for good, young garbage is collected in small portions, and a full collection waits for
a moment with few requests. Then the memory that a burst has left free is given back to the system.
"""

import asyncio
import ctypes
import gc
import mmap
import sys
import time
from collections.abc import Callable

# CPython's thresholds: with them, an automatic collection looks at some 2,400 objects at most. In a
# burst most are coroutines, whose frames are looked through, and out of the caches: 4 us for each.
YOUNG, MIDDLE, NEVER = 600, 3, 1 << 30
LOOK_S = 1.0
PAUSE_S = 5.0  # between two full collections
FEW = 200  # requests
FEW_OBJECTS = 4_000  # that a full collection looks at; with so many it takes about 10 ms
MAX_WAIT_S = 3600.0  # a server that always has more collects nevertheless
WORTH_IT = 1.03  # so much more memory than was left the last time is given back


async def collect_in_quiet(num_active: Callable[[], int]) -> None:
    """Look after it for as long as the loop runs; never returns.

    Args:
        num_active: requests that are at work, or whose answers are.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, NEVER)
    left, before = _give_back(), 0
    collected_at = time.monotonic()
    while True:
        await asyncio.sleep(LOOK_S)
        active, waited_s = num_active(), time.monotonic() - collected_at
        is_quiet = active <= FEW
        if has_grown() and (
            (is_quiet and waited_s > PAUSE_S and num_old() <= FEW_OBJECTS) or waited_s > MAX_WAIT_S
        ):
            gc.collect()
            left = _give_back()  # with what CPython's free lists have held
            collected_at = time.monotonic()
        # When a burst goes down, each second a part: all of it together would take too long a step.
        elif FEW < active < before or (is_quiet and resident_bytes() > WORTH_IT * left):
            _give_back()
        before = active


def has_grown() -> bool:
    """Whether there is anything that a full collection could find: some objects have grown old."""
    return gc.get_count()[1:] != (0, 0)


def num_old() -> int:
    """Objects that only a full collection looks at: those of requests, and of open connections."""
    # The list holds a reference to every object, and a thread that is building a tuple of unknown
    # length fails (SystemError) if it goes on meanwhile. Within one call of next() no other thread
    # gets the GIL, so the list is gone before any goes on.
    return next(map(len, map(gc.get_objects, (2,))))


def resident_bytes() -> int:
    """Resident memory of this process; 0 where Linux does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def _give_back() -> int:
    """Give free memory back to the system; what is resident then. Only glibc has to be told."""
    # CPython keeps the names of its latest attribute look-ups. pyzmq makes a new one for each wait,
    # and each would hold a page.
    sys._clear_type_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    return resident_bytes()
