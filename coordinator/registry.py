"""Which pools there are, and whether they live. Pure: told what arrived, it says what to send.

The life of a pool through this file
1. ``on_hello`` checks each rank; when the whole gang is here, each rank is sent ``Welcome``.
2. ``on_gang_ready``: when every rank is, the pool is READY and every ready rank gets the
   ``Topology``, whose version rises with each change.
3. ``on_connected``: a pool serves once all its ranks reach every pool of that topology.
4. ``on_heartbeat`` and every other message keep a rank alive; ``expire`` finds the silent ones.
5. A lost rank takes its pool with it: the other ranks are told to end, the topology goes on without
   the pool. A HELLO for a lost pool opens it again at a higher epoch.
"""

import enum
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field

from coordinator.config import ExpectedPool
from protocol.errors import PeerError
from protocol.kv import KVLayout, PoolEndpoint
from protocol.messages import (
    PROTOCOL_VERSION,
    Connected,
    GangReady,
    Heartbeat,
    Hello,
    Shutdown,
    Topology,
    ToRank,
    Welcome,
)

CHECK_INTERVAL_S = 1.0
Outgoing = tuple[str, ToRank]  # (routing id, message)


class PoolState(enum.Enum):
    FORMING = "forming"  # ranks are missing
    WELCOMED = "welcomed"  # all are here, the gang forms
    READY = "ready"
    LOST = "lost"


class HelloRefused(PeerError):
    """A rank cannot join. ``is_ours`` tells one that knows the cluster's token from a stranger."""

    def __init__(self, reason: str, *, is_ours: bool = True) -> None:
        super().__init__(reason)
        self.is_ours = is_ours


@dataclass(slots=True)
class Rank:
    """One process of a pool, as far as it has introduced itself."""

    peer: str
    hello: Hello
    last_seen: float
    tokens_per_s: float = 0.0
    is_ready: bool = False
    connected_version: int = 0
    heartbeat: Heartbeat | None = None


@dataclass(slots=True)
class Pool:
    """A gang: it is whole or it is nothing."""

    spec: ExpectedPool
    epoch: int = 1
    state: PoolState = PoolState.FORMING
    joined_version: int = 0  # the topology that first named this epoch of it
    ranks: dict[int, Rank] = field(default_factory=dict)

    @property
    def pool_id(self) -> str:
        return self.spec.pool_id

    @property
    def leader(self) -> str:
        """Routing id of rank 0."""
        return self.ranks[0].peer

    @property
    def connected_version(self) -> int:
        return min((rank.connected_version for rank in self.ranks.values()), default=0)

    @property
    def is_serving(self) -> bool:
        """Ready, and connected to itself at least."""
        return self.state is PoolState.READY and self.connected_version >= self.joined_version

    @property
    def tokens_per_s(self) -> float:
        """Measured by its leader at start; 0 when it has not."""
        return self.ranks[0].tokens_per_s

    def endpoint(self) -> PoolEndpoint:
        return PoolEndpoint(
            pool_id=self.pool_id,
            role=self.spec.role,
            epoch=self.epoch,
            cp_size=self.spec.cp_size,
            tp_size=self.spec.tp_size,
            ranks=tuple(self.ranks[i].hello.endpoint for i in range(self.spec.num_ranks)),
        )


class Registry:
    """All pools of the cluster.

    Args:
        pools: what the cluster consists of.
        token: the cluster's secret.
        model_fingerprint: of the model that the coordinator tokenizes for.
        block_size: of every pool.
        coordinator_epoch: new each time the coordinator starts.
        heartbeat_timeout_s: a rank silent for longer is lost.
    """

    def __init__(
        self,
        pools: Iterable[ExpectedPool],
        *,
        token: str,
        model_fingerprint: str,
        block_size: int,
        coordinator_epoch: int,
        heartbeat_timeout_s: float,
    ) -> None:
        self.pools = {spec.pool_id: Pool(spec) for spec in pools}
        self.version = 0
        self._token = token.encode()
        self._model_fingerprint = model_fingerprint
        self._block_size = block_size
        self._coordinator_epoch = coordinator_epoch
        self._timeout_s = heartbeat_timeout_s
        self._peers: dict[str, tuple[Pool, Rank]] = {}
        self._last_check: float | None = None

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
        needed = max(source.joined_version, target.joined_version)
        return min(source.connected_version, target.connected_version) >= needed

    def max_model_len(self, limit: int) -> int:
        """What every pool can take, and no more than ``limit``."""
        ranks = [rank for pool in self.pools.values() for rank in pool.ranks.values()]
        return min([limit, *(rank.hello.max_model_len for rank in ranks)])

    def pool_of(self, peer: str) -> tuple[Pool, bool] | None:
        """The pool that a routing id belongs to and whether it leads it; None for a stranger."""
        known = self._peers.get(peer)
        return None if known is None else (known[0], known[0].leader == peer)

    def missing(self) -> str:
        """What keeps the cluster from being complete, in words."""
        parts = []
        for pool in self.pools.values():
            absent = pool.spec.num_ranks - len(pool.ranks)
            if absent:
                parts.append(f"{pool.pool_id} lacks {absent} of {pool.spec.num_ranks} ranks")
            elif pool.state is not PoolState.READY:
                parts.append(f"{pool.pool_id} is loading its model")
            elif pool.connected_version < self.version:
                parts.append(f"{pool.pool_id} does not reach the other pools yet")
        return ", ".join(parts)

    # -- what happens ------------------------------------------------------------------------------

    def on_hello(self, peer: str, hello: Hello, now: float) -> list[Outgoing]:
        """A rank introduces itself.

        Raises:
            HelloRefused: it cannot join; nothing has changed.
        """
        pool = self._check_hello(hello)
        rank_number = hello.endpoint.rank
        known = pool.ranks.get(rank_number)
        if known is not None and known.hello.endpoint.incarnation == hello.endpoint.incarnation:
            known.last_seen = now  # said twice: the answer is on its way, or not due
            return []
        if known is not None and pool.state is not PoolState.LOST:
            raise HelloRefused(f"{pool.pool_id} has a rank {rank_number} already")
        if pool.state is PoolState.LOST:
            pool.state, pool.ranks = PoolState.FORMING, {}
        rank = Rank(peer, hello, now, hello.tokens_per_s)
        pool.ranks[rank_number] = rank
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
        pool.state = PoolState.READY
        pool.joined_version = self.version + 1
        return self._topology()

    def on_connected(self, peer: str, message: Connected, now: float) -> None:
        _, rank = self._seen(peer, now)
        rank.connected_version = max(rank.connected_version, message.version)

    def on_heartbeat(self, peer: str, message: Heartbeat, now: float) -> None:
        _, rank = self._seen(peer, now)
        rank.heartbeat = message

    def on_other(self, peer: str, now: float) -> None:
        """Any message is a sign of life."""
        self._seen(peer, now)

    def expire(self, now: float) -> list[tuple[str, str]]:
        """(pool_id, reason) of each ready pool with a rank silent for too long.

        Call it every ``CHECK_INTERVAL_S``. A pause of our own must not look like the death of
        everybody else, so time in which nobody asked does not count.
        """
        last = now if self._last_check is None else self._last_check
        pause_s = now - last - CHECK_INTERVAL_S
        self._last_check = now
        if pause_s > self._timeout_s / 2:
            for _, rank in self._peers.values():
                rank.last_seen += pause_s
        return [
            (pool.pool_id, f"rank {number} was silent for {now - rank.last_seen:.1f} s")
            for pool in self.pools.values()
            if pool.state is PoolState.READY
            for number, rank in pool.ranks.items()
            if now - rank.last_seen > self._timeout_s
        ]

    def lose(self, pool_id: str, reason: str) -> list[Outgoing]:
        """The pool is gone: tell what is left of it to end, and all others to go on without it."""
        pool = self.pools[pool_id]
        if pool.state is PoolState.LOST:
            return []
        was_ready = pool.state is PoolState.READY
        outgoing: list[Outgoing] = []
        for rank in pool.ranks.values():
            del self._peers[rank.peer]
            outgoing.append((rank.peer, Shutdown(reason)))
        pool.state, pool.ranks, pool.epoch = PoolState.LOST, {}, pool.epoch + 1
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
        if not hmac.compare_digest(hello.token.encode(), self._token):
            raise HelloRefused("wrong cluster token", is_ours=False)
        if hello.version != PROTOCOL_VERSION:
            raise HelloRefused(
                f"protocol version {hello.version}, this coordinator speaks {PROTOCOL_VERSION}"
            )
        pool = self.pools.get(hello.pool_id)
        if pool is None:
            raise HelloRefused(f"this cluster has no pool {hello.pool_id!r}")
        spec, endpoint = pool.spec, hello.endpoint
        said = (hello.role, hello.cp_size, hello.tp_size)
        if said != (spec.role, spec.cp_size, spec.tp_size):
            raise HelloRefused(f"{hello.pool_id} is {spec}, not {said}")
        is_in_mesh = 0 <= endpoint.rank < spec.num_ranks and divmod(
            endpoint.rank, spec.tp_size
        ) == (endpoint.cp_rank, endpoint.tp_rank)
        if not is_in_mesh:
            raise HelloRefused(f"{hello.pool_id} has no rank {endpoint.rank} at that mesh position")
        if (hello.gang is not None) != (endpoint.rank == 0):
            raise HelloRefused("the leader, and only it, says where the gang meets")
        if hello.model_fingerprint != self._model_fingerprint:
            raise HelloRefused(
                f"{hello.pool_id} rank {endpoint.rank} has loaded another model "
                f"({hello.model_fingerprint!r}, not {self._model_fingerprint!r}): "
                f"every machine needs the same checkpoint"
            )
        self._check_layout(endpoint.layout, hello)
        return pool

    def _check_layout(self, layout: KVLayout, hello: Hello) -> None:
        where = f"{hello.pool_id} rank {hello.endpoint.rank}"
        if layout.block_size != self._block_size:
            raise HelloRefused(f"{where}: block size {layout.block_size}, not {self._block_size}")
        if (layout.tp_rank, layout.tp_size) != (hello.endpoint.tp_rank, hello.tp_size):
            raise HelloRefused(f"{where}: its KV layout is of another rank")
        for _, rank in self._peers.values():
            if not layout.is_compatible(rank.hello.endpoint.layout):
                raise HelloRefused(
                    f"{where}: its KV cannot move to {rank.hello.pool_id} (dtype, heads or layers)"
                )

    def _welcome(self, pool: Pool) -> list[Outgoing]:
        pool.state = PoolState.WELCOMED
        gang = pool.ranks[0].hello.gang
        assert gang is not None
        welcome = Welcome(self._coordinator_epoch, pool.epoch, gang)
        return [(rank.peer, welcome) for rank in pool.ranks.values()]

    def _topology(self) -> list[Outgoing]:
        self.version += 1
        ready = [pool for pool in self.pools.values() if pool.state is PoolState.READY]
        topology = Topology(self.version, tuple(pool.endpoint() for pool in ready))
        return [(rank.peer, topology) for pool in ready for rank in pool.ranks.values()]
