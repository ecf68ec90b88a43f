"""Crash points: places where something durable is about to happen, or has just happened.

Code that writes what must survive gets a :class:`CrashPoints` and reports each place it passes.
Without failpoints nothing happens there. A failpoint that fires ends the process as a kill would,
fills the disk, or takes a while.
"""

import asyncio
import contextlib
import errno
import os
import threading
import time
from collections import Counter
from typing import NoReturn

from protocol.process.failpoints import EXIT, FAIL, Failpoints, Fault

EXIT_FAILPOINT = 86


def exit_here(name: str) -> NoReturn:
    """Die as a killed process does: nothing is flushed or closed. One line is written."""
    with contextlib.suppress(OSError):
        os.write(2, f"failpoint {name}: exit\n".encode())
    os._exit(EXIT_FAILPOINT)


class CrashPoints:
    """The crash points of one process; any thread may reach one. False without failpoints.

    Args:
        text: see :mod:`protocol.process.failpoints`; empty for none.
        hits: where hits are counted; a new counter by default.

    Raises:
        ConfigError: it names the part of ``text`` that is wrong.
    """

    def __init__(self, text: str = "", hits: Counter[str] | None = None) -> None:
        self._failpoints = Failpoints(text, hits)
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._failpoints)

    @property
    def hits(self) -> Counter[str]:
        return self._failpoints.hits

    def reach(self, name: str, kind: str = "") -> None:
        """To be called from a thread that may block.

        Raises:
            OSError: ``ENOSPC``, if a failpoint says so.
        """
        if self._failpoints and (fault := self._fault(name, kind)) is not None:
            time.sleep(fault.seconds)

    async def pass_by(self, name: str, kind: str = "") -> None:
        """The same, from an event loop, which goes on meanwhile."""
        if self._failpoints and (fault := self._fault(name, kind)) is not None:
            await asyncio.sleep(fault.seconds)

    def _fault(self, name: str, kind: str) -> Fault | None:
        """Die or raise of what is to be done here; else a delay, or nothing."""
        with self._lock:
            fault = self._failpoints.reach(name, kind)
        if fault is not None and fault.action == EXIT:
            exit_here(f"{name}.{kind}" if kind else name)
        if fault is not None and fault.action == FAIL:
            raise OSError(errno.ENOSPC, f"failpoint {name}")
        return fault
