"""Failpoints of the coordinator: its messages to ranks and its event loop, made to fail.

:class:`FaultyOutlet` stands in for :class:`Outlet` only if failpoints are configured; what they do
to a message on its way to a rank is what a broken network would, and what they do to the loop is
what a bug or somebody's input would.
"""

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections import Counter

from coordinator.control import Outlet
from protocol.errors import PeerError
from protocol.messages import ToRank
from protocol.process.crash_points import exit_here
from protocol.process.failpoints import (
    CONTROL_SEND,
    DELAY,
    DROP,
    DUPLICATE,
    EXIT,
    LOOP,
    Failpoints,
    Fault,
    kind_of,
)
from protocol.sockets import AsyncRouter


class FaultyOutlet(Outlet):
    """Drops, repeats and delays what is sent to ranks, or dies of it.

    Args:
        router: bound.
        failpoints: see ``protocol.process.failpoints``.
        counters: of their hits.
    """

    def __init__(self, router: AsyncRouter, failpoints: str, counters: Counter[str]) -> None:
        super().__init__(router)
        self._failpoints = Failpoints(failpoints, counters)
        self._late: set[asyncio.Task[None]] = set()

    async def send(self, peer: str, message: ToRank) -> None:
        kind = kind_of(type(message))
        stall = self._failpoints.reach(LOOP, kind)
        if stall is not None:
            stall_here(stall, f"{LOOP}.{kind}")
        fault = self._failpoints.reach(CONTROL_SEND, kind)
        action = fault.action if fault is not None else ""
        if action == EXIT:
            exit_here(f"{CONTROL_SEND}.{kind}")
        if fault is not None and action == DELAY:
            task = asyncio.create_task(self._send_late(fault.seconds, peer, message))
            self._late.add(task)
            task.add_done_callback(self._late.discard)
        if action not in (DELAY, DROP):
            await super().send(peer, message)
        if action == DUPLICATE:
            await super().send(peer, message)

    async def _send_late(self, seconds: float, peer: str, message: ToRank) -> None:
        await asyncio.sleep(seconds)
        with contextlib.suppress(PeerError):  # that it is gone shows in the next message
            await super().send(peer, message)


def stall_here(fault: Fault, name: str) -> None:
    """Keep the thread that calls it, and with HOLD the whole interpreter, from going on."""
    match fault.action:
        case "exit":
            exit_here(name)
        case "hold":
            _hold_gil(fault.seconds)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "delay":
            threading.Event().wait(fault.seconds)
        case "hang":
            threading.Event().wait()


def _hold_gil(seconds: float) -> None:
    """Compute, as a long call into C does that never lets another thread run."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(2 * seconds + 1.0)  # who waits for the GIL asks for it after so long
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    sys.setswitchinterval(interval_s)
