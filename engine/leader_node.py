"""What the leader of a pool is, whatever its role. Without clock, socket, thread or torch.

The life of a step
1. ``on_event`` takes in what has come: messages of the coordinator, what became of a hand-off, what
   a disk has done.
2. ``schedule`` decides the next step: a plan, which every rank of the pool executes. None when
   there is nothing to compute now, which for a store is always so.
3. ``update`` takes in what the ranks have brought.
4. ``take_commands``, after any of these: what is to be done now, by the transfer thread or by the
   disk's threads.

Calls alternate: any number of ``on_event``, one ``schedule``, and if that had a plan, one
``update`` with its results. Nothing blocks. A process, the simulations, the experiments, the
exhaustive search and the tests call the same four methods, each with a clock of its own.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from kvtransfer.events import Command, Event, Load
from protocol.plans import StepPlan, StepResult

P = TypeVar("P", bound=StepPlan)


class LeaderNode(Protocol[P]):
    """The leader of a prefill pool, of a decode pool, or of a store; ``P`` is its plan."""

    def on_event(self, event: Event, now: float) -> None:
        """Take note of an event. One that concerns nobody here changes nothing."""
        ...

    def schedule(self, now: float) -> P | None:
        """The next step's plan, or None when there is nothing to compute now."""
        ...

    def update(self, plan: P, results: Sequence[StepResult], now: float) -> None:
        """Take note of what a step has brought.

        Args:
            plan: what ``schedule`` has returned last.
            results: of the ranks, the own one first; those of ranks that sample nothing may miss.
            now: after the step, on the clock of ``schedule``.
        """
        ...

    def take_commands(self) -> list[Command]:
        """What is to be done since the last call, in order."""
        ...

    def load(self) -> Load:
        """What it has to do and what it holds, for a heartbeat."""
        ...

    @property
    def is_idle(self) -> bool:
        """Whether no request is here at all."""
        ...

    def check(self) -> None:
        """Assert that every block is accounted for, and that nothing is held for nobody."""
        ...
