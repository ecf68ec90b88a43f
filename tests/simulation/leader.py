"""A leader's loop on virtual time, around any node; what the loop of a process does on real time.

1. An event wakes the loop, which takes in all that has come a moment later, and schedules.
2. A plan takes a while. At its end the ranks have executed it, and the node is updated.
3. What the node wants done is done at once, in order.
"""

from abc import ABC, abstractmethod
from collections import deque
from functools import partial
from typing import Generic

from engine.leader_node import LeaderNode, P
from kvtransfer.events import Command, Event
from protocol.plans import StepResult
from tests.simulation.world import EventLoop


class VirtualLeader(ABC, Generic[P]):
    """A leader, alive until it is said not to be.

    Args:
        world: its clock.
        node: decides.
    """

    turn_s = 0.0001  # from an event to the turn that takes it in

    def __init__(self, world: EventLoop, node: LeaderNode[P]) -> None:
        self.world = world
        self.node = node
        self.is_alive = True
        self.paused_until = 0.0
        self._events: deque[Event] = deque()
        self._is_busy = False

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

    @abstractmethod
    def _step_s(self, plan: P) -> float:
        """How long a step takes that begins now."""

    @abstractmethod
    def _execute(self, plan: P) -> list[StepResult]:
        """What the ranks bring, at the end of the step."""

    @abstractmethod
    def _do(self, command: Command) -> None:
        """What the transfer thread, or a disk, is to do."""
