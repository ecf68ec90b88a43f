"""What can be one node of the explored network.

A ``Node`` has addresses, and what is sent between two addresses keeps its order. ``Leader`` is a
leading rank together with its main thread, what they say to each other being taken at once. Without
it each is a node of its own, and the queues between them are links like any other.
"""

from collections import deque
from typing import Any, Protocol

from tests.exploration.inputs import Computed, Message, Option, Outbox, StepEnds
from tests.exploration.mains import Main
from tests.exploration.ranks import Rank


class Node(Protocol):
    """Something with a state of its own, which only its inputs change."""

    outbox: Outbox

    def options(self) -> list[Option]:
        """What can happen here without a message."""
        ...

    def take(self, option: Option, found: bytes | None) -> None:
        """Take one of its options; ``found`` is what a read finds at its source."""
        ...

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is under way here."""
        ...

    def receive(self, sender: str, message: Message) -> None:
        """Take a message, and put what follows into the outbox."""
        ...


class Leader:
    """A leading rank and its main thread."""

    def __init__(self, rank: Rank, main: Main[Any]) -> None:
        self.rank = rank
        self.main = main
        self.outbox: Outbox = []

    @property
    def is_quiet(self) -> bool:
        return self.rank.is_quiet and self.main.is_quiet

    def options(self) -> list[Option]:
        return [*self.rank.options(), *self.main.options()]

    def take(self, option: Option, found: bytes | None) -> None:
        if isinstance(option, StepEnds):
            self.main.take(option, found)
        else:
            self.rank.take(option, found)
        self._settle()

    def receive(self, sender: str, message: Message) -> None:
        (self.main if isinstance(message, Computed) else self.rank).receive(sender, message)
        self._settle()

    def _settle(self) -> None:
        """Until the two have nothing to say to each other."""
        rank, main = self.rank, self.main
        pending: deque[tuple[str, str, Message]] = deque()
        while rank.outbox or main.outbox or pending:
            pending += rank.outbox + main.outbox
            rank.outbox.clear()
            main.outbox.clear()
            sender, receiver, message = pending.popleft()
            if receiver == main.name and sender == rank.name:
                main.receive(sender, message)
            elif receiver == rank.name and sender == main.name:
                rank.receive(sender, message)
            else:
                self.outbox.append((sender, receiver, message))


def rank_of(node: Node) -> Rank:
    """The transfer thread of a node that has one."""
    rank = node.rank if isinstance(node, Leader) else node
    assert isinstance(rank, Rank)
    return rank


def main_of(node: Node) -> Main[Any]:
    """The main thread of a node that has one."""
    main = node.main if isinstance(node, Leader) else node
    assert isinstance(main, Main)
    return main
