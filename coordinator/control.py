"""The control plane's socket: frames in, frames out, and a tick each second.

What a frame means is decided by the registry and the service; nothing here keeps a request's state.
Sends are queued and done by one task, so that whoever decides never waits, and order is kept.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterable
from typing import Protocol

from coordinator.registry import CHECK_INTERVAL_S, HelloRefused, Outgoing, Registry
from protocol.codec import Codec
from protocol.errors import IllegalTransition, PeerError, VersionError
from protocol.messages import (
    Connected,
    GangReady,
    Heartbeat,
    Hello,
    Refused,
    ToCoordinator,
    ToRank,
)
from protocol.sockets import AsyncRouter

_INCOMING: Codec[ToCoordinator] = Codec(ToCoordinator)
_OUTGOING: Codec[ToRank] = Codec(ToRank)

_log = logging.getLogger(__name__)


class RequestHandler(Protocol):
    """What the control plane passes on."""

    def on_message(self, pool_id: str, message: ToCoordinator) -> None: ...

    def on_pool_lost(self, pool_id: str) -> None: ...

    def sweep(self, now: float) -> None: ...


class ControlPlane:
    """The coordinator's end of every rank's connection.

    ``complete`` is set when every expected pool serves for the first time; ``refused`` gets the
    reason when a rank of ours was turned away before that.
    """

    def __init__(self, router: AsyncRouter, registry: Registry) -> None:
        self.complete = asyncio.Event()
        self.refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._router = router
        self._registry = registry
        self._handler: RequestHandler | None = None
        self._outbox: asyncio.Queue[Outgoing] = asyncio.Queue()
        self.counters: Counter[str] = Counter()

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
        while True:
            peer, frame = await self._router.receive()
            try:
                message = _INCOMING.decode(frame)
            except VersionError as error:
                _log.warning("dropped a frame of %s: %s", peer[:80], error)
                continue
            try:
                self._dispatch(peer, message, time.monotonic())
            except (PeerError, IllegalTransition) as error:
                _log.warning("dropped %s of %s: %s", type(message).__name__, peer[:80], error)

    def _dispatch(self, peer: str, message: ToCoordinator, now: float) -> None:
        if isinstance(message, Hello):
            self._on_hello(peer, message, now)
            return
        if isinstance(message, GangReady):
            self._queue(self._registry.on_gang_ready(peer, message, now))
        elif isinstance(message, Connected):
            self._registry.on_connected(peer, message, now)
            if self._registry.is_complete:
                self.complete.set()
        elif isinstance(message, Heartbeat):
            self._registry.on_heartbeat(peer, message, now)
        else:
            self._registry.on_other(peer, now)
            pool = self._registry.pool_of(peer)
            if pool is not None and pool[1] and self._handler is not None:
                self._handler.on_message(pool[0].pool_id, message)

    def _on_hello(self, peer: str, hello: Hello, now: float) -> None:
        try:
            self._queue(self._registry.on_hello(peer, hello, now))
        except HelloRefused as error:
            _log.error("refused %s: %s", peer[:80], error)
            self._outbox.put_nowait((peer, Refused(str(error))))
            if error.is_ours and not self.complete.is_set() and not self.refused.done():
                self.refused.set_result(str(error))

    def _queue(self, outgoing: Iterable[Outgoing]) -> None:
        for item in outgoing:
            self._outbox.put_nowait(item)

    async def _send_all(self) -> None:
        while True:
            peer, message = await self._outbox.get()
            await self._send_one(peer, message)

    async def _send_one(self, peer: str, message: ToRank) -> None:
        try:
            await self._router.send(peer, _OUTGOING.encode(message))
        except PeerError as error:
            pool = self._registry.pool_of(peer)
            if pool is not None:
                self._lose(pool[0].pool_id, str(error))

    def _lose(self, pool_id: str, reason: str) -> None:
        _log.error("lost %s: %s", pool_id, reason)
        self._queue(self._registry.lose(pool_id, reason))
        if self._handler is not None:
            self._handler.on_pool_lost(pool_id)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            now = time.monotonic()
            for pool_id, reason in self._registry.expire(now):
                self._lose(pool_id, reason)
            if self._handler is not None:
                self._handler.sweep(now)
