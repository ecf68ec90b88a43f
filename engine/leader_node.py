"""The one interface of the leaders of all roles. Without clock, socket, thread or torch.

The life of a step
1. ``on_event`` takes in a message of the coordinator, the outcome of a hand-off, or that of a
   disk's job.
2. ``schedule`` decides the next step: a plan, which every rank of the pool executes. None when
   there is nothing to compute now, which for a store is always so.
3. ``update`` takes in the results of the ranks.
4. ``take_commands``, after any of these, gives the commands for the transfer thread, or the disk's
   threads.

Calls alternate: any number of ``on_event``, one ``schedule``, and if that had a plan, one
``update`` with its results. Nothing blocks. A process, the simulations, the experiments, the
exhaustive search and the tests drive it by the same four methods, each with a clock of its own.

A node is made of its *facts*, which never change while the pool lives, and of the block spaces of
its ranks, which are its alone to change. Its parts share one :class:`Commands`.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from kvtransfer.events import Command, Event, Load, SendControl
from protocol.messages import ToCoordinator
from protocol.plans import StepPlan, StepResult

P = TypeVar("P", bound=StepPlan)


class LeaderNode(Protocol[P]):
    """The leader of a prefill pool, of a decode pool, or of a store; ``P`` is its plan."""

    def on_event(self, event: Event, now: float) -> None:
        """Take in an event. One that concerns no request here changes nothing."""
        ...

    def schedule(self, now: float) -> P | None:
        """The next step's plan, or None when there is nothing to compute now."""
        ...

    def update(self, plan: P, results: Sequence[StepResult], now: float) -> None:
        """Take in the results of a step.

        Args:
            plan: what ``schedule`` has returned last.
            results: of the ranks, the leader's first; ranks that sample nothing may be missing.
            now: after the step, on the clock of ``schedule``.
        """
        ...

    def take_commands(self) -> list[Command]:
        """The commands decided on since the last call, in order."""
        ...

    def load(self) -> Load:
        """The work that waits and runs, and the blocks that are held, for a heartbeat."""
        ...

    @property
    def is_idle(self) -> bool:
        """Whether no request is here at all."""
        ...

    def check(self) -> None:
        """Assert that every block is accounted for, and that no request that is gone holds one."""
        ...


class Commands:
    """The commands of a leader node, in order, until a driver takes them."""

    def __init__(self) -> None:
        self._waiting: list[Command] = []

    def add(self, *commands: Command) -> None:
        """Add commands, after all that were added before."""
        self._waiting += commands

    def tell(self, message: ToCoordinator) -> None:
        """Add the command to send a message to the coordinator."""
        self.add(SendControl(message))

    def take(self) -> list[Command]:
        """The commands added since the last call, in order."""
        taken = self._waiting
        self._waiting = []
        return taken
