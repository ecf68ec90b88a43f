"""A pool as far as the coordinator knows it: its ranks, its state and what they have said last."""

import enum
from dataclasses import dataclass, field

from coordinator.config import ExpectedPool
from protocol.kv import PoolEndpoint
from protocol.messages import Heartbeat, Hello


class PoolState(enum.Enum):
    FORMING = "forming"  # ranks are missing
    WELCOMED = "welcomed"  # all are here, the gang forms
    READY = "ready"
    LOST = "lost"


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
    epoch: int
    state: PoolState = PoolState.FORMING
    joined_version: int = 0  # the topology that first named this epoch of it
    ranks: dict[int, Rank] = field(default_factory=dict)
    gang_start: int = 0  # the launcher's count, of the gang that is here or was last
    ended: frozenset[str] = frozenset()  # incarnations of the gang that was told to end
    is_awaited: bool = False  # it runs, and has to say HELLO again
    holds_others: bool = True  # which are told of the topology with it; while it is awaited
    awaited_until: float | None = None
    reason: str = ""  # for which it was lost

    @property
    def pool_id(self) -> str:
        return self.spec.pool_id

    @property
    def leader(self) -> str:
        """Routing id of rank 0."""
        return self.ranks[0].peer

    @property
    def num_blocks(self) -> int:
        """Of KV that each of its ranks has: those that found less memory decide."""
        return min(rank.hello.endpoint.layout.num_blocks for rank in self.ranks.values())

    @property
    def num_slots(self) -> int:
        """Tokens of one request whose KV it can hold."""
        block_size = self.ranks[0].hello.endpoint.layout.block_size
        return self.num_blocks * block_size * self.spec.cp_size

    @property
    def connected_version(self) -> int:
        return min((rank.connected_version for rank in self.ranks.values()), default=0)

    @property
    def is_serving(self) -> bool:
        """Ready, and connected to itself at least."""
        return self.state is PoolState.READY and self.connected_version >= self.joined_version

    @property
    def cut_off(self) -> set[str]:
        """Other pools that a rank of it does not reach."""
        beats = (rank.heartbeat for rank in self.ranks.values())
        return {pool_id for beat in beats if beat is not None for pool_id in beat.cut_off}

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
