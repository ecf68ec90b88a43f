"""The control plane: the node's connections to all ranks, and its clock.

What a message means is decided by the node (node.py); nothing here keeps a request's state. What it
commands is done by one task, in order, so that whoever decides never waits.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from coordinator.cluster.registry import CHECK_INTERVAL_S
from coordinator.loop.slices import Pace, parts_of
from coordinator.node import (
    SWEEP_INTERVAL_S,
    Command,
    Complete,
    CoordinatorNode,
    GiveUp,
    News,
    Report,
    Send,
    StepDown,
)
from protocol.codec import Codec
from protocol.errors import BatonError, IllegalTransition, PeerError, VersionError
from protocol.messages import ToCoordinator, ToRank
from protocol.sockets import AsyncRouter

_INCOMING: Codec[ToCoordinator] = Codec(ToCoordinator)
_OUTGOING: Codec[ToRank] = Codec(ToRank)

_log = logging.getLogger(__name__)


class StartFailed(BatonError):
    """The cluster did not come up. The message says why."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whoever runs a coordinator."""

    tell: Callable[[News], None] = lambda _: None
    on_stale: Callable[[str], None] = lambda _: None  # another has taken over: end at once


class Outlet:
    """The way of messages to ranks."""

    def __init__(self, router: AsyncRouter) -> None:
        self._router = router

    async def send(self, peer: str, message: ToRank) -> None:
        """Hand a message to the network.

        Raises:
            PeerError: the rank's connection is gone.
        """
        await self._router.send(peer, _OUTGOING.encode(message))


class ControlPlane:
    """The coordinator's end of every rank's connection.

    ``started`` is done when the cluster can answer for the first time; it raises StartFailed if a
    rank of ours was turned away before that.

    Args:
        router: bound.
        outlet: of messages to ranks.
        owner: who is told what happens to the pools.
    """

    def __init__(self, router: AsyncRouter, outlet: Outlet, owner: Owner = Owner()) -> None:
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._router = router
        self._outlet = outlet
        self._owner = owner
        self._has_commands = asyncio.Event()
        self._num_dropped = 0

    def wake(self) -> None:
        """The node has something to be done."""
        self._has_commands.set()

    async def run(self, node: CoordinatorNode) -> None:
        """Drive a node, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._receive_all(node))
            tasks.create_task(self._do_all(node))
            tasks.create_task(self._tick(node))

    async def shut_down(self, node: CoordinatorNode, reason: str) -> None:
        """Tell every rank to end, after ``run``; returns when it has been handed to the network."""
        node.shut_down(reason)
        for command in node.take_commands():
            await self._do(node, command)

    async def _receive_all(self, node: CoordinatorNode) -> None:
        pace = Pace()
        while True:
            peer, frame = await self._router.receive()  # at once, while anything is there
            try:
                message = _INCOMING.decode(frame)
            except VersionError as error:
                _log.warning("dropped a frame of %s: %s", peer[:80], error)
                continue
            for part in parts_of(message):
                self._take(node, peer, part)
                await pace.breathe()

    def _take(self, node: CoordinatorNode, peer: str, message: ToCoordinator) -> None:
        try:
            node.on_message(peer, message, time.monotonic())
        except (PeerError, IllegalTransition) as error:
            self._num_dropped += 1
            if self._num_dropped & (self._num_dropped - 1) == 0:  # 1, 2, 4, ...: no full log
                name = type(message).__name__
                _log.warning("dropped %s of %s: %s", name, peer[:80], error)

    async def _do_all(self, node: CoordinatorNode) -> None:
        pace = Pace()
        while True:
            await self._has_commands.wait()
            self._has_commands.clear()
            for command in node.take_commands():
                await self._do(node, command)
                await pace.breathe()

    async def _do(self, node: CoordinatorNode, command: Command) -> None:
        match command:
            case Send(peer, message):
                try:
                    await self._outlet.send(peer, message)
                except PeerError as error:
                    node.on_unreachable(peer, str(error))
            case Report(news):
                self._owner.tell(news)
            case Complete() if not self.started.done():
                self.started.set_result(None)
            case GiveUp(reason) if not self.started.done():
                self.started.set_exception(StartFailed(f"a worker was refused: {reason}"))
            case StepDown(reason):
                self._owner.on_stale(reason)

    async def _tick(self, node: CoordinatorNode) -> None:
        next_sweep = 0.0
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            if self._router.is_displaced:
                self._owner.on_stale(f"another listens at {self._router.address}")
            now = time.monotonic()
            node.tick(now)
            if now >= next_sweep:
                next_sweep = now + SWEEP_INTERVAL_S
                node.sweep(now)
