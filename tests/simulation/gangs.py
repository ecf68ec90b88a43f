"""A gang: its ranks, and its leader on virtual time around a real node."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic

from coordinator.config import ExpectedPool
from engine.leader_node import LeaderNode, P
from kvtransfer.events import Command, Event, SendControl
from kvtransfer.identity import RankIdentity
from protocol.kv import KVLayout
from protocol.messages import ToCoordinator
from tests.simulation.leader import VirtualLeader
from tests.simulation.ranks import Rank
from tests.simulation.world import EventLoop

FINGERPRINT = "simulated"
MAX_MODEL_LEN = 200
STEP_S = 0.01
Key = tuple[str, int]


class Gang(VirtualLeader[P], Generic[P]):
    """One life of a pool.

    Args:
        world: its clock.
        everyone: all ranks by incarnation.
        spec: what it is.
        life: counts its starts; 1 is the first.
        layouts: of the memory of each rank.
        tell: takes what its leader says to the coordinator.
    """

    def __init__(
        self,
        world: EventLoop,
        everyone: dict[str, Rank],
        spec: ExpectedPool,
        life: int,
        layouts: Sequence[KVLayout],
        tell: Callable[[ToCoordinator], None],
    ) -> None:  # fmt: skip
        self.spec = spec
        self._tell = tell
        self.ranks = [
            Rank(
                world,
                everyone,
                self._identity(rank, life),
                layout,
                self.on_event if rank == 0 else _ignore,
            )
            for rank, layout in enumerate(layouts)
        ]
        super().__init__(world, self._make_node(world))

    def _identity(self, rank: int, life: int) -> RankIdentity:
        spec = self.spec
        incarnation = f"{spec.pool_id}.{rank}.{life}"
        return RankIdentity(spec.role, spec.pool_id, rank, spec.cp_size, spec.tp_size, incarnation)

    def kill(self) -> None:
        """Nothing of it does anything any more."""
        self.is_alive = False
        for rank in self.ranks:
            rank.is_alive = False

    @property
    def num_open(self) -> int:
        """Hand-offs that are not over, on any rank."""
        return sum(rank.node.num_open for rank in self.ranks)

    def _do(self, command: Command) -> None:
        if isinstance(command, SendControl):
            self._tell(command.message)
        else:
            self.ranks[0].command(command)

    @abstractmethod
    def _make_node(self, world: EventLoop) -> LeaderNode[P]:
        """Who decides; the ranks are there."""


class CheckedGang(Gang[P], Generic[P]):
    """A gang whose steps take some time, and whose blocks are recounted at every turn."""

    def _step_s(self, plan: P) -> float:
        del plan
        return self.world.delay(STEP_S)

    def _turn(self) -> None:
        super()._turn()
        self.node.check()


def _ignore(event: Event) -> None:
    """A follower's main thread has nothing to decide."""
