"""The control plane's socket: frames in, frames out, and a tick that is our own sign of life.

What a frame means is decided by the registry and the service; nothing here keeps a request's state.
Sends are queued and done by one task, so that whoever decides never waits, and order is kept.

A rank's loss shows when it is told that we live: its connection is gone. Which pools are lost for
good and which serve is told to the launcher, which ends and starts processes.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from coordinator.cluster.joining import HelloRefused
from coordinator.cluster.registry import CHECK_INTERVAL_S, Outgoing, Registry
from coordinator.loop.slices import Pace, parts_of
from protocol.codec import Codec
from protocol.errors import IllegalTransition, PeerError, VersionError
from protocol.messages import (
    Connected,
    GangReady,
    Heartbeat,
    Hello,
    Introduce,
    Refused,
    ToCoordinator,
    ToRank,
)
from protocol.sockets import AsyncRouter

SWEEP_INTERVAL_S = 1.0
_INCOMING: Codec[ToCoordinator] = Codec(ToCoordinator)
_OUTGOING: Codec[ToRank] = Codec(ToRank)

_log = logging.getLogger(__name__)


class RequestHandler(Protocol):
    """What the control plane passes on."""

    def on_message(self, pool_id: str, message: ToCoordinator) -> None: ...

    def on_pool_lost(self, pool_id: str) -> None: ...

    def on_pool_serving(self, pool_id: str) -> None: ...

    def sweep(self, now: float) -> Iterable[tuple[str, str]]:
        """What is due; (pool, reason) of each pool that is to be lost."""
        ...


News = dict[str, str | int]  # one line for the launcher


@dataclass(frozen=True, slots=True)
class Owner:
    """Whoever runs a coordinator, as the control plane sees it."""

    tell: Callable[[News], None] = lambda _: None
    on_stale: Callable[[str], None] = lambda _: None  # another has taken over: end at once


class ControlPlane:
    """The coordinator's end of every rank's connection.

    ``complete`` is set when every expected pool serves for the first time; ``refused`` gets the
    reason when a rank of ours was turned away before that.

    Args:
        router: bound.
        registry: which pools there are.
        owner: who is told what happens to them.
        is_restart: the cluster runs already, and is complete when it can answer.
        clock: monotonic seconds, of a clock that stands still while the event loop does.
    """

    def __init__(
        self,
        router: AsyncRouter,
        registry: Registry,
        owner: Owner = Owner(),
        *,
        is_restart: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self.complete = asyncio.Event()
        self.refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._router = router
        self._registry = registry
        self._owner = owner
        self._is_restart = is_restart
        self._handler: RequestHandler | None = None
        self._outbox: asyncio.Queue[Outgoing] = asyncio.Queue()
        self._unreachable: dict[str, str] = {}  # peers, and why; to be lost at the next tick
        self._serving: set[tuple[str, int]] = set()  # pools and their epochs
        self.counters: Counter[str] = Counter()
        self._num_dropped = 0

    def attach(self, handler: RequestHandler) -> None:
        """Who gets the messages about requests; before ``run``."""
        self._handler = handler

    def send(self, pool_id: str, message: ToRank) -> None:
        """Queue a message to a pool's leader. A lost pool is told nothing."""
        pool = self._registry.pools[pool_id]
        if 0 in pool.ranks:
            self._outbox.put_nowait((pool.leader, message))

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._receive_all())
            tasks.create_task(self._send_all())
            tasks.create_task(self._tick())

    async def shut_down(self, reason: str) -> None:
        """Tell every rank to end; returns when it has been handed to the network."""
        for peer, message in self._registry.shut_down(reason):
            # Who cannot be told has ended already.
            with contextlib.suppress(PeerError):
                await self._router.send(peer, _OUTGOING.encode(message))

    async def _receive_all(self) -> None:
        pace = Pace()
        while True:
            peer, frame = await self._router.receive()  # at once, while anything is there
            try:
                message = _INCOMING.decode(frame)
            except VersionError as error:
                _log.warning("dropped a frame of %s: %s", peer[:80], error)
                continue
            for part in parts_of(message):
                self._take(peer, part)
                await pace.breathe()

    def _take(self, peer: str, message: ToCoordinator) -> None:
        try:
            self._dispatch(peer, message, self._clock())
        except (PeerError, IllegalTransition) as error:
            self._num_dropped += 1
            if self._num_dropped & (self._num_dropped - 1) == 0:  # 1, 2, 4, ...: no full log
                name = type(message).__name__
                _log.warning("dropped %s of %s: %s", name, peer[:80], error)

    def _dispatch(self, peer: str, message: ToCoordinator, now: float) -> None:
        if isinstance(message, Hello):
            self._on_hello(peer, message, now)
            return
        if isinstance(message, GangReady):
            self._queue(self._registry.on_gang_ready(peer, message, now))
        elif isinstance(message, Connected):
            self._registry.on_connected(peer, message, now)
            self._note_serving()
        elif isinstance(message, Heartbeat):
            self._on_heartbeat(peer, message, now)
        else:
            self._registry.on_other(peer, now)
            pool = self._registry.pool_of(peer)
            if pool is not None and pool[1] and self._handler is not None:
                self._handler.on_message(pool[0].pool_id, message)

    def _on_heartbeat(self, peer: str, message: Heartbeat, now: float) -> None:
        if self._registry.pool_of(peer) is None:  # of our predecessor's, or of a gang that is lost
            self._outbox.put_nowait((peer, Introduce(self._registry.coordinator_epoch)))
        else:
            self._registry.on_heartbeat(peer, message, now)

    def _on_hello(self, peer: str, hello: Hello, now: float) -> None:
        try:
            displaced = self._registry.displaces(peer, hello)
            if hello.coordinator_epoch > self._registry.coordinator_epoch:
                self._owner.on_stale(f"{peer} has seen coordinator {hello.coordinator_epoch}")
                return
            if displaced is not None:
                self._lose(hello.pool_id, displaced.reason, is_over=displaced.is_over)
            self._queue(self._registry.on_hello(peer, hello, now))
        except HelloRefused as error:
            _log.error("refused %s: %s", peer[:80], error)
            self._outbox.put_nowait((peer, Refused(str(error))))
            is_fatal = not self._is_restart and not self.complete.is_set()
            if is_fatal and not self.refused.done():
                self.refused.set_result(str(error))

    def _note_serving(self) -> None:
        """Whoever serves now and did not before: tell the service, and the launcher."""
        pools = [pool for pool in self._registry.pools.values() if pool.is_serving]
        for pool in pools:
            if (pool.pool_id, pool.epoch) in self._serving:
                continue
            _log.info("%s serves, epoch %d", pool.pool_id, pool.epoch)
            if self._handler is not None:
                self._handler.on_pool_serving(pool.pool_id)
            if self._is_restart or self.complete.is_set():
                self._owner.tell({"serving": pool.pool_id, "start": pool.gang_start})
        self._serving = {(pool.pool_id, pool.epoch) for pool in pools}
        can_answer = self._is_restart and any(pool.spec.role == "decode" for pool in pools)
        if can_answer or self._registry.is_complete:
            self.complete.set()

    def _queue(self, outgoing: Iterable[Outgoing]) -> None:
        for item in outgoing:
            self._outbox.put_nowait(item)

    async def _send_all(self) -> None:
        pace = Pace()
        while True:
            peer, message = await self._outbox.get()  # neither does this wait for the others
            await self._send_one(peer, message)
            await pace.breathe()

    async def _send_one(self, peer: str, message: ToRank) -> None:
        try:
            await self._router.send(peer, _OUTGOING.encode(message))
        except PeerError as error:
            if self._registry.pool_of(peer) is not None:
                self._unreachable.setdefault(peer, str(error))

    def _lose(
        self, pool_id: str, reason: str, *, is_over: bool = True, holds_others: bool = True
    ) -> None:
        _log.error("lost %s: %s", pool_id, reason)
        if is_over:
            start = self._registry.pools[pool_id].gang_start
            self._owner.tell({"lost": pool_id, "start": start, "reason": reason})
        self._queue(
            self._registry.lose(pool_id, reason, is_over=is_over, holds_others=holds_others)
        )
        if self._handler is not None:
            self._handler.on_pool_lost(pool_id)

    def _lose_unreachable(self) -> None:
        """Who could not be sent to a tick ago, and has not said HELLO on another line since."""
        unreachable, self._unreachable = self._unreachable, {}
        for peer, reason in unreachable.items():
            found = self._registry.pool_of(peer)
            # Dead, or starved until libzmq gave its connection up. Of the dead the launcher knows
            # by itself; a gang that lives may come back, like one that is only silent.
            if found is not None:
                self._lose(found[0].pool_id, reason, is_over=False, holds_others=False)

    async def _tick(self) -> None:
        next_sweep = 0.0
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            if self._router.is_displaced:
                self._owner.on_stale(f"another listens at {self._router.address}")
            now = self._clock()
            self._lose_unreachable()
            for loss in self._registry.expire(now):
                self._lose(loss.pool_id, loss.reason, is_over=loss.is_over, holds_others=False)
            self._queue(self._registry.due())
            self._queue(self._registry.beat())
            if now < next_sweep:
                continue
            next_sweep = now + SWEEP_INTERVAL_S
            if self._is_restart or self.complete.is_set():
                self._owner.tell({"alive": self._registry.coordinator_epoch})
            if self._handler is not None:
                for pool_id, reason in self._handler.sweep(now):
                    self._lose(pool_id, reason)
