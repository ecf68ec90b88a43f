"""Failpoints of the coordinator: its control plane and its event loop, made to fail when told to.

It stands in for :class:`ControlPlane` only if failpoints are configured; what they do to a message
on its way to a rank is what a broken network would, and what they do to the loop is what a bug or
somebody's input would.
"""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from coordinator.cluster.control import ControlPlane, Owner
from coordinator.cluster.registry import Registry
from protocol.crash_points import exit_here
from protocol.failpoints import (
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
from protocol.messages import ToRank
from protocol.sockets import AsyncRouter


class FaultyControlPlane(ControlPlane):
    """Drops, repeats and delays what is sent to ranks, or dies of it."""

    def __init__(
        self,
        router: AsyncRouter,
        registry: Registry,
        owner: Owner,
        *,
        is_restart: bool,
        clock: Callable[[], float],
        failpoints: str,
    ) -> None:
        super().__init__(router, registry, owner, is_restart=is_restart, clock=clock)
        self._failpoints = Failpoints(failpoints, self.counters)
        self._late: set[asyncio.Task[None]] = set()

    async def _send_one(self, peer: str, message: ToRank) -> None:
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
            await super()._send_one(peer, message)
        if action == DUPLICATE:
            await super()._send_one(peer, message)

    async def _send_late(self, seconds: float, peer: str, message: ToRank) -> None:
        await asyncio.sleep(seconds)
        await super()._send_one(peer, message)


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
