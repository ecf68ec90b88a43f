"""Timers that are on time: an event loop's own come in whole milliseconds.

One timerfd holds the earliest deadline of a heap; the loop sees it as one more file that becomes
readable. Where the system has none, the loop's timers do.
"""

import asyncio
import ctypes
import heapq
import itertools
import os
import sys
import time
from collections.abc import Callable

_CLOCK_MONOTONIC, _ABSOLUTE = 1, 1
_NONBLOCK_CLOEXEC = 0o4000 | 0o2000000


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Timer(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Pacer:
    """Calls back at instants of ``time.monotonic``. Of the running loop's thread only."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._armed_for = 0.0  # 0: not armed
        self._descriptor = -1
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._descriptor = self._libc.timerfd_create(_CLOCK_MONOTONIC, _NONBLOCK_CLOEXEC)
        if self._descriptor >= 0:
            self._loop.add_reader(self._descriptor, self._wake)

    def at(self, when: float, callback: Callable[[], None]) -> None:
        """Call ``callback`` at ``when``, or as soon as possible if that has passed."""
        heapq.heappush(self._heap, (when, next(self._order), callback))
        if not self._armed_for or when < self._armed_for:
            self._arm(when)

    async def until(self, when: float) -> None:
        """Return at ``when``; at once if that has passed."""
        if when <= time.monotonic():
            return
        reached = self._loop.create_future()
        self.at(when, lambda: None if reached.done() else reached.set_result(None))
        await reached

    def flush(self) -> None:
        """Call back everybody now."""
        heap, self._heap = self._heap, []
        for _, _, callback in heap:
            callback()

    def close(self) -> None:
        """Forget what is left."""
        self._heap.clear()
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _arm(self, when: float) -> None:
        self._armed_for = when
        if self._descriptor < 0:
            self._loop.call_later(max(0.0, when - time.monotonic()), self._fire)
            return
        nanoseconds = max(1, int(when * 1e9))  # 0 would disarm it
        value = _Timespec(*divmod(nanoseconds, 1_000_000_000))
        timer = _Timer(_Timespec(0, 0), value)
        if self._libc.timerfd_settime(self._descriptor, _ABSOLUTE, ctypes.byref(timer), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def _wake(self) -> None:
        try:
            os.read(self._descriptor, 8)
        except BlockingIOError:
            return  # armed anew between its ringing and our coming
        self._fire()

    def _fire(self) -> None:
        self._armed_for = 0.0
        heap = self._heap
        while heap and heap[0][0] <= time.monotonic():
            heapq.heappop(heap)[2]()
        if heap and (not self._armed_for or heap[0][0] < self._armed_for):
            self._arm(heap[0][0])
