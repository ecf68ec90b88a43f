"""A gang on virtual time: its ranks, and its leader's loop around a real node.

What the loop of a process does on real time:

1. An event wakes the loop, which takes in all that has come a moment later, and schedules.
2. A plan takes a while. At its end the ranks have executed it, and the node is updated.
3. What the node wants done is done at once, in order.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic

from bench.simulate.event_loop import EventLoop
from bench.simulate.ranks import Rank
from coordinator.config import ExpectedPool
from engine.leader_node import LeaderNode, P
from kvtransfer.events import Command, Event, SendControl
from kvtransfer.identity import RankIdentity
from protocol.kv import KVLayout
from protocol.messages import ToCoordinator
from protocol.plans import StepResult


@dataclass(frozen=True, slots=True)
class Site:
    """Where a gang lives.

    Args:
        world: the clock.
        everyone: all ranks by incarnation, the dead ones too.
        spec: what the pool is.
        life: counts its starts; 1 is the first.
        tell: takes what its leader says to the coordinator.
    """

    world: EventLoop
    everyone: dict[str, Rank]
    spec: ExpectedPool
    life: int
    tell: Callable[[ToCoordinator], None]


class Gang(ABC, Generic[P]):
    """One life of a pool. A subclass says what its steps take and bring.

    Args:
        site: where it lives.
        layouts: of the memory of each rank.
    """

    turn_s = 0.0001  # from an event to the turn that takes it in
    tokens_per_s = 0.0  # as a pool measures itself when it starts

    def __init__(self, site: Site, layouts: Sequence[KVLayout]) -> None:
        self.world = site.world
        self.spec = site.spec
        self.is_alive = True
        self.paused_until = 0.0
        self._tell = site.tell
        self._events: deque[Event] = deque()
        self._is_busy = False
        self.ranks = [
            Rank(
                site.world,
                site.everyone,
                self._identity(rank, site.life),
                layout,
                self.on_event if rank == 0 else _ignore,
            )
            for rank, layout in enumerate(layouts)
        ]
        self.node = self._make_node()

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

    # -- the leader's loop -------------------------------------------------------------------------

    def on_event(self, event: Event) -> None:
        """Something for its main thread."""
        self._events.append(event)
        self.wake()

    def wake(self) -> None:
        """Have it look, unless it is in a step."""
        if self.is_alive and not self._is_busy:
            self._is_busy = True
            pause_s = max(0.0, self.paused_until - self.world.now)
            self.world.at(pause_s + self.turn_s, self._turn)

    def _turn(self) -> None:
        if not self.is_alive:
            return
        while self._events:
            self.node.on_event(self._events.popleft(), self.world.now)
            self._pass_on()
        plan = self.node.schedule(self.world.now)
        self._pass_on()
        if plan is not None:
            self.world.at(self._step_s(plan), partial(self._end, plan))
            return
        self._is_busy = False
        if self._events:  # what its own commands have brought
            self.wake()

    def _end(self, plan: P) -> None:
        if self.is_alive:
            self.node.update(plan, self._execute(plan), self.world.now)
            self._pass_on()
            self._is_busy = False
            self.wake()

    def _pass_on(self) -> None:
        for command in self.node.take_commands():
            self._do(command)

    def _do(self, command: Command) -> None:
        """What the transfer thread, or a disk, is to do."""
        if isinstance(command, SendControl):
            self._tell(command.message)
        else:
            self.ranks[0].command(command)

    @abstractmethod
    def _make_node(self) -> LeaderNode[P]:
        """Who decides; the ranks are there."""

    @abstractmethod
    def _step_s(self, plan: P) -> float:
        """How long a step takes that begins now."""

    @abstractmethod
    def _execute(self, plan: P) -> list[StepResult]:
        """What the ranks bring, at the end of the step."""


def _ignore(event: Event) -> None:
    """A follower's main thread has nothing to decide."""
