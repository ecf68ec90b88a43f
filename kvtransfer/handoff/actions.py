"""What the logic of hand-offs asks for, and what its sides know in common.

The logic (source.py, target.py, leader.py) has no sockets, threads or clock: commands, messages and
read results go in with a time, actions come out. The rank node carries them out in order.
"""

from collections import Counter
from dataclasses import dataclass, field

from kvtransfer.events import Event
from kvtransfer.identity import PeerName, RankIdentity
from kvtransfer.plan import ByteRun
from protocol.handoff import HandoffMessage
from protocol.kv import KVLayout, PoolEndpoint, RankEndpoint


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to a rank; it may be this one."""

    peer: PeerName
    message: HandoffMessage


@dataclass(frozen=True, slots=True)
class Emit:
    """Give an event to the main thread."""

    event: Event


@dataclass(frozen=True, slots=True)
class StartRead:
    """Post a read. ``RankNode.read_ended`` gets its end under ``read_id``."""

    read_id: int
    incarnation: str
    runs: tuple[ByteRun, ...]


@dataclass(frozen=True, slots=True)
class Warn:
    """Warn the operator."""

    text: str


Action = Send | Emit | StartRead | Warn


@dataclass(slots=True)
class RankState:
    """What the sides of one rank know in common. Only the rank node changes it.

    ``counters`` counts what was dropped, for the heartbeat.
    """

    identity: RankIdentity
    layout: KVLayout
    epoch: int = 0
    pools: dict[str, PoolEndpoint] = field(default_factory=dict)
    counters: Counter[str] = field(default_factory=Counter)

    def epoch_of(self, pool_id: str) -> int | None:
        """The present epoch of a pool that can be reached, None of any other."""
        if pool_id == self.identity.pool_id:
            return self.epoch
        pool = self.pools.get(pool_id)
        return None if pool is None else pool.epoch

    def endpoint(self, peer: PeerName) -> RankEndpoint | None:
        pool = self.pools.get(peer.pool_id)
        if pool is None or not 0 <= peer.rank < len(pool.ranks):
            return None
        return pool.ranks[peer.rank]

    def own_ranks(self) -> list[PeerName]:
        return [PeerName(self.identity.pool_id, r) for r in range(self.identity.world_size)]

    @property
    def leader(self) -> PeerName:
        return PeerName(self.identity.pool_id, 0)

    def drop(self, reason: str) -> list[Action]:
        """Count a message that is not acted upon; no action follows."""
        self.counters[f"dropped_{reason}"] += 1
        return []
