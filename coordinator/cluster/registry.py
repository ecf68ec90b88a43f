"""Which pools there are, and whether they live. Pure: told what arrived, it says what to send.

The life of a pool through this file
1. ``on_hello`` checks each rank; when the whole gang is here, each rank is sent ``Welcome``.
2. ``on_gang_ready``: when every rank is, the pool is READY and every ready rank gets the
   ``Topology``, whose version rises with each change.
3. ``on_connected``: a pool serves once all its ranks reach every pool of that topology.
4. ``on_heartbeat`` and every other message keep a rank alive; ``expire`` finds the silent ones.
5. A lost rank takes its pool with it: the other ranks are told to end, the topology goes on without
   the pool. A HELLO for a lost pool opens it again at a higher epoch, if it is of a new process:
   what was lost stays lost.
6. Ranks that had to give *us* up, and say HELLO once more, are the same gang: the pool is lost and
   opens again with them (``displaces`` says so). After a restart of the coordinator all running
   gangs come like that; who does not come in time is lost.
7. A gang that is only silent, stopped, cut off or starved, may come back as well: the others go on
   without it at once, and it is told to end when it has not come within ``rejoin_s``. That a rank's
   process has ended is the launcher's to see.

A pool's epoch has the coordinator's in its high bits, so it rises over coordinators too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from coordinator.cluster.joining import HelloRefused, JoinRequirements
from coordinator.cluster.pools import Pool, PoolState, Rank
from coordinator.config import ExpectedPool
from protocol.errors import PeerError
from protocol.messages import (
    Alive,
    Connected,
    GangReady,
    Heartbeat,
    Hello,
    Introduce,
    Shutdown,
    Topology,
    ToRank,
    Welcome,
)

CHECK_INTERVAL_S = 0.3
EPOCH_BITS = 20  # a pool's epochs under one coordinator
Outgoing = tuple[str, ToRank]  # (routing id, message)


class Loss(NamedTuple):
    """A pool is to be lost. ``is_over``: its gang must end; else it may come back."""

    pool_id: str
    reason: str
    is_over: bool


@dataclass(frozen=True, slots=True)
class Displaced:
    """The gang that a pool has must go for a HELLO to be taken. ``is_over``: it must end, too."""

    reason: str
    is_over: bool


@dataclass(frozen=True, slots=True)
class Timeouts:
    """For how long what is allowed; in seconds."""

    silent_s: float = 4.0  # a rank of a ready pool
    starting_s: float = 60.0  # a rank that loads its model
    step_s: float = 60.0  # one step
    rejoin_s: float = 10.0  # a gang that is expected back
    hold_s: float = 3.0  # the others wait so long with it, so that they need not connect twice


class Registry:
    """All pools of the cluster.

    Args:
        pools: what the cluster consists of.
        requirements: what every rank must agree to.
        coordinator_epoch: higher each time the coordinator starts.
        timeouts: with ranks and gangs.
        rejoining: pools that run already, under an earlier coordinator.
    """

    def __init__(
        self,
        pools: Iterable[ExpectedPool],
        requirements: JoinRequirements,
        *,
        coordinator_epoch: int,
        timeouts: Timeouts,
        rejoining: Iterable[str] = (),
    ) -> None:
        first_epoch = (coordinator_epoch << EPOCH_BITS) + 1
        self.pools = {spec.pool_id: Pool(spec, first_epoch) for spec in pools}
        self.version = 0
        self.coordinator_epoch = coordinator_epoch
        self._requirements = requirements
        self._timeouts = timeouts
        self._peers: dict[str, tuple[Pool, Rank]] = {}
        self._last_check: float | None = None
        self._is_due = False  # a topology, held back for a gang that is expected
        for pool_id in rejoining:
            self.pools[pool_id].is_awaited = True

    # -- what is asked -----------------------------------------------------------------------------

    @property
    def is_complete(self) -> bool:
        """Every expected pool serves, and reaches all the others."""
        return all(
            pool.state is PoolState.READY and pool.connected_version == self.version
            for pool in self.pools.values()
        )

    def serving(self, role: str) -> list[Pool]:
        return [pool for pool in self.pools.values() if pool.spec.role == role and pool.is_serving]

    def can_hand_over(self, source: Pool, target: Pool) -> bool:
        """Whether the ranks of the two pools reach each other."""
        if source.pool_id in target.cut_off or target.pool_id in source.cut_off:
            return False
        needed = max(source.joined_version, target.joined_version)
        return min(source.connected_version, target.connected_version) >= needed

    def max_model_len(self, limit: int) -> int:
        """Tokens of prompt and answer that every pool can take, and no more than ``limit``.

        The last token needs no slot: nothing follows it.
        """
        ranks = [rank for pool in self.pools.values() for rank in pool.ranks.values()]
        whole = [
            pool
            for pool in self.pools.values()
            if pool.spec.role != "store" and len(pool.ranks) == pool.spec.num_ranks
        ]
        return min(
            [
                limit,
                *(rank.hello.max_model_len for rank in ranks),
                *(pool.num_slots + 1 for pool in whole),
            ]
        )

    def pool_of(self, peer: str) -> tuple[Pool, bool] | None:
        """The pool that a routing id belongs to and whether it leads it; None for a stranger."""
        known = self._peers.get(peer)
        return None if known is None else (known[0], known[0].ranks.get(0) is known[1])

    def missing(self) -> str:
        """What keeps the cluster from being complete, in words."""
        parts = []
        for pool in self.pools.values():
            lost = f" (lost: {pool.reason})" if pool.reason else ""
            absent = pool.spec.num_ranks - len(pool.ranks)
            if absent:
                parts.append(f"{pool.pool_id} lacks {absent} of {pool.spec.num_ranks} ranks{lost}")
            elif pool.state is not PoolState.READY:
                parts.append(f"{pool.pool_id} is loading its model")
            elif pool.connected_version < self.version:
                parts.append(f"{pool.pool_id} does not reach the other pools yet")
        return ", ".join(parts)

    # -- what happens ------------------------------------------------------------------------------

    def displaces(self, peer: str, hello: Hello) -> Displaced | None:
        """Whether the pool's present gang must be lost before ``on_hello`` can take this one.

        Raises:
            HelloRefused: it cannot join; nothing has changed.
        """
        pool = self._check_hello(hello)
        known = pool.ranks.get(hello.endpoint.rank)
        if pool.ranks and hello.gang_start > pool.gang_start:
            return Displaced("its launcher has started another gang", is_over=True)
        if known is None or known.hello.endpoint.incarnation != hello.endpoint.incarnation:
            return None
        if known.peer == peer or pool.state is PoolState.FORMING:
            return None
        return Displaced("it had given up this coordinator", is_over=False)

    def on_hello(self, peer: str, hello: Hello, now: float) -> list[Outgoing]:
        """A rank introduces itself, or says HELLO once more.

        Raises:
            HelloRefused: it cannot join; nothing has changed.
        """
        pool = self._check_hello(hello)
        known = pool.ranks.get(hello.endpoint.rank)
        if known is not None and known.hello.endpoint.incarnation == hello.endpoint.incarnation:
            del self._peers[known.peer]  # said twice: the answer is on its way, or not due
            known.peer, known.last_seen = peer, now
            self._peers[peer] = (pool, known)
            return []
        if known is not None:
            raise HelloRefused(f"{pool.pool_id} has a rank {hello.endpoint.rank} already")
        if pool.state is PoolState.LOST:
            pool.state = PoolState.FORMING
        rank = Rank(peer, hello, now, hello.tokens_per_s)
        pool.gang_start = hello.gang_start
        pool.is_awaited &= hello.coordinator_epoch > 0  # else it is a new process, and has time
        pool.ranks[hello.endpoint.rank] = rank
        self._peers[peer] = (pool, rank)
        return self._welcome(pool) if len(pool.ranks) == pool.spec.num_ranks else []

    def on_gang_ready(self, peer: str, message: GangReady, now: float) -> list[Outgoing]:
        pool, rank = self._seen(peer, now)
        rank.is_ready = True
        rank.tokens_per_s = message.tokens_per_s or rank.tokens_per_s
        if pool.state is not PoolState.WELCOMED or not all(
            rank.is_ready for rank in pool.ranks.values()
        ):
            return []
        pool.state, pool.reason, pool.is_awaited = PoolState.READY, "", False
        pool.joined_version = self.version + 1
        return self._topology()

    def on_connected(self, peer: str, message: Connected, now: float) -> None:
        _, rank = self._seen(peer, now)
        rank.connected_version = max(rank.connected_version, message.version)

    def on_heartbeat(self, peer: str, message: Heartbeat, now: float) -> None:
        _, rank = self._seen(peer, now)
        rank.heartbeat = message

    def on_other(self, peer: str, now: float) -> tuple[Pool, bool]:
        """Any message is a sign of life; whose, and whether it leads its pool."""
        pool, rank = self._seen(peer, now)
        return pool, pool.ranks.get(0) is rank

    def beat(self) -> list[Outgoing]:
        """A word to every rank that has said HELLO: it cannot be sent to one that is gone."""
        alive = Alive(self.coordinator_epoch)
        return [(peer, alive) for peer in self._peers]

    def expire(self, now: float) -> list[Loss]:
        """The pools that are to be lost: a rank has been silent for too long, a step takes too
        long, or a gang has not come back.

        Call it every ``CHECK_INTERVAL_S``. A pause of our own must not look like the death of
        everybody else, so time in which nobody asked does not count.
        """
        last = now if self._last_check is None else self._last_check
        pause_s = now - last - CHECK_INTERVAL_S
        self._last_check = now
        if pause_s > self._timeouts.silent_s / 2:
            for _, rank in self._peers.values():
                rank.last_seen += pause_s
            for pool in self.pools.values():
                if pool.awaited_until is not None:
                    pool.awaited_until += pause_s
        losses = (self._overdue(pool, now) for pool in self.pools.values())
        return [loss for loss in losses if loss is not None]

    def _overdue(self, pool: Pool, now: float) -> Loss | None:
        is_ready = pool.state is PoolState.READY
        timeouts = self._timeouts
        for number, rank in pool.ranks.items():
            silent_s = now - rank.last_seen
            if silent_s > (timeouts.silent_s if is_ready else timeouts.starting_s):
                reason = f"rank {number} was silent for {silent_s:.1f} s"
                return Loss(pool.pool_id, reason, is_over=not is_ready)
        if is_ready:
            ages = {n: r.heartbeat.step_age_s for n, r in pool.ranks.items() if r.heartbeat}
            oldest = max(ages, key=lambda number: ages[number], default=0)
            if ages and ages[oldest] > timeouts.step_s:
                reason = f"rank {oldest} has been in one step for {ages[oldest]:.1f} s"
                return Loss(pool.pool_id, reason, is_over=True)
        elif pool.is_awaited:
            if pool.awaited_until is None:
                pool.awaited_until = now + timeouts.rejoin_s
            elif now > pool.awaited_until:
                reason = f"it did not come back within {timeouts.rejoin_s:.0f} s"
                return Loss(pool.pool_id, reason, is_over=True)
        return None

    def due(self) -> list[Outgoing]:
        """What was held back and need not be any longer. Ask it after ``expire``."""
        return self._topology() if self._is_due else []

    def lose(
        self, pool_id: str, reason: str, *, is_over: bool = True, holds_others: bool = True
    ) -> list[Outgoing]:
        """The pool is gone: all others go on without it.

        Args:
            is_over: tell what is left of its gang to end; or else to come again.
            holds_others: it will come at once, so that the others need not be told it was gone.
        """
        pool = self.pools[pool_id]
        if pool.state is PoolState.LOST and not pool.is_awaited:
            return []
        was_ready = pool.state is PoolState.READY
        told = Shutdown(reason) if is_over else Introduce(self.coordinator_epoch)
        outgoing: list[Outgoing] = [(rank.peer, told) for rank in pool.ranks.values()]
        for peer, _ in outgoing:
            del self._peers[peer]
        if is_over:
            incarnations = (rank.hello.endpoint.incarnation for rank in pool.ranks.values())
            pool.ended = frozenset(incarnations)
        pool.state, pool.ranks, pool.epoch = PoolState.LOST, {}, pool.epoch + 1
        pool.is_awaited, pool.awaited_until, pool.reason = not is_over, None, reason
        pool.holds_others = holds_others
        return outgoing + (self._topology() if was_ready else [])

    def shut_down(self, reason: str) -> list[Outgoing]:
        """The cluster ends."""
        return [(peer, Shutdown(reason)) for peer in self._peers]

    # -- inside ------------------------------------------------------------------------------------

    def _seen(self, peer: str, now: float) -> tuple[Pool, Rank]:
        if peer not in self._peers:
            raise PeerError(f"{peer} has not said hello, or its pool is lost")
        pool, rank = self._peers[peer]
        rank.last_seen = now
        return pool, rank

    def _check_hello(self, hello: Hello) -> Pool:
        pool = self.pools.get(hello.pool_id)
        others = (rank.hello for _, rank in self._peers.values())
        self._requirements.check(hello, None if pool is None else pool.spec, others)
        assert pool is not None, "the requirements ask for a pool that exists"
        if hello.gang_start < pool.gang_start or hello.endpoint.incarnation in pool.ended:
            raise HelloRefused(f"this gang of {pool.pool_id} was lost: {pool.reason}")
        return pool

    def _welcome(self, pool: Pool) -> list[Outgoing]:
        pool.state = PoolState.WELCOMED
        gang = pool.ranks[0].hello.gang
        assert gang is not None
        welcome = Welcome(self.coordinator_epoch, pool.epoch, gang, pool.num_blocks)
        return [(rank.peer, welcome) for rank in pool.ranks.values()]

    def _is_held(self) -> bool:
        timeouts, now = self._timeouts, self._last_check or 0.0
        return any(
            pool.awaited_until is None
            or now < pool.awaited_until - timeouts.rejoin_s + timeouts.hold_s
            for pool in self.pools.values()
            if pool.is_awaited and pool.holds_others
        )

    def _topology(self) -> list[Outgoing]:
        self._is_due = self._is_held()
        if self._is_due:
            return []
        self.version += 1
        ready = [pool for pool in self.pools.values() if pool.state is PoolState.READY]
        topology = Topology(self.version, tuple(pool.endpoint() for pool in ready))
        return [(rank.peer, topology) for pool in ready for rank in pool.ranks.values()]
