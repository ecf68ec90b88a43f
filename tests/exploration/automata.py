"""The cluster as a network of automata, whose tables are filled in as they are asked for.

A node does the same whenever the same input meets the same state, so each such pair is computed
once, on a copy of the real objects. From then on a state of the whole cluster is a row of small
numbers: the state of each node, the content of each link, and how many faults may still happen.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial

import msgspec

from protocol.errors import BatonError
from protocol.handoff import HandoffMessage
from tests.exploration.clusters import Cluster
from tests.exploration.inputs import (
    COORDINATOR,
    DONE,
    FAILED,
    Message,
    Option,
    Outbox,
    ReadEnds,
    Start,
)
from tests.exploration.leaders import Node, rank_of
from tests.exploration.snapshots import clone, freeze, freeze_leaf

DEAD = 0  # the state of a node that has died
EMPTY = 0  # the content of a link on which nothing is


@dataclass(slots=True)
class Effect:
    """What an input does to a node, and what it says then: (link, messages by number)."""

    state: int
    said: tuple[tuple[int, tuple[int, ...]], ...]
    problem: str = ""


@dataclass(slots=True)
class Automaton:
    """One node: its states so far, and what can happen in each."""

    name: str
    states: list[Node | None] = field(default_factory=lambda: [None])
    options: list[tuple[Option, ...]] = field(default_factory=lambda: [()])
    _known: dict[Hashable, int] = field(default_factory=dict)

    def number(self, node: Node) -> int:
        """Of the state that a node is in."""
        frozen = freeze(node)
        known = self._known.get(frozen)
        if known is None:
            known = self._known[frozen] = len(self.states)
            self.states.append(node)
            self.options.append(tuple(node.options()))
        return known


class Network:
    """All automata and the links between them.

    Args:
        cluster: has not been started.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.automata = [Automaton(name) for name in cluster.nodes]
        self.index_of = {name: index for index, name in enumerate(cluster.nodes)}
        self.links = cluster.links()
        self._link_of = {link: index for index, link in enumerate(self.links)}
        self.messages: list[Message] = []
        self._messages: dict[Hashable, int] = {}
        self.num_computed = 0

    def copy_of(self, index: int, state: int) -> Node:
        """A node in a state, to be changed."""
        node = self.automata[index].states[state]
        assert node is not None, "it is dead"
        return clone(node)

    def node_at(self, address: str) -> int:
        """The index of the node that has an address."""
        return self.index_of[self.cluster.node_of[address]]

    # -- the beginning -----------------------------------------------------------------------------

    def started(self) -> list[int]:
        """Let every gang come up, in order; the states of the nodes then."""
        nodes = self.cluster.nodes
        pending: Outbox = [
            (COORDINATOR, rank, Start())
            for life in self.cluster.first_lives()
            for rank in life.ranks
        ]
        while pending:
            sender, receiver, message = pending.pop(0)
            node = nodes[self.cluster.node_of[receiver]]
            node.receive(sender, message)
            pending += node.outbox
            node.outbox.clear()
        return [
            automaton.number(node)
            for automaton, node in zip(self.automata, nodes.values(), strict=True)
        ]

    # -- what an input does ------------------------------------------------------------------------

    def deliver(self, link: int, state: int, message: int) -> Effect:
        """A message comes to a node."""
        sender, receiver = self.links[link]
        index, said = self.node_at(receiver), self.messages[message]
        node = self.copy_of(index, state)
        effect = self._run(index, state, node, partial(node.receive, sender, said))
        for stale in _stale_copies(said):
            other = self.copy_of(index, state)
            late = self._run(index, state, other, partial(other.receive, sender, stale))
            if (late.state, late.said, late.problem) != (state, (), ""):
                effect.problem = effect.problem or f"not dropped although it is stale: {stale}"
        return effect

    def take(self, index: int, state: int, slot: int, peer: int) -> Effect | None:
        """A node takes an option; None when it cannot. ``peer`` is the state of the read's source.

        A read from a rank that has died cannot but fail; any other can fail if that is explored.
        """
        automaton = self.automata[index]
        option = automaton.options[state][slot]
        found = None
        if isinstance(option, ReadEnds):
            if not self._can_end(option, peer):
                return None
            if option.how == DONE:
                source = self.copy_of(self.node_at(option.incarnation), peer)
                found = rank_of(source).memory.source_bytes(option.runs)
        node = self.copy_of(index, state)
        return self._run(index, state, node, partial(node.take, option, found))

    def _can_end(self, option: ReadEnds, peer: int) -> bool:
        if peer == DEAD:
            return option.how == FAILED
        return option.how != FAILED or self.cluster.case.setting.reads_fail

    def _run(self, index: int, state: int, node: Node, act: Callable[[], None]) -> Effect:
        self.num_computed += 1
        try:
            act()
        except (AssertionError, BatonError, LookupError, ValueError) as error:
            return Effect(state, (), f"{type(error).__name__}: {error}")
        said: dict[int, list[int]] = {}
        for sender, receiver, message in node.outbox:
            link = self._link_of[sender, receiver]
            said.setdefault(link, []).append(self.message_number(message))
        node.outbox.clear()
        words = tuple((link, tuple(numbers)) for link, numbers in said.items())
        return Effect(self.automata[index].number(node), words)

    def message_number(self, message: Message) -> int:
        """Of a message; what is said in other words but means the same has the same number."""
        frozen = (type(message).__name__, freeze_leaf(message))
        known = self._messages.get(frozen)
        if known is None:
            known = self._messages[frozen] = len(self.messages)
            self.messages.append(message)
        return known

    # -- in words ----------------------------------------------------------------------------------

    def describe(self, message: object) -> str:
        """A message, for a trace."""
        inner = getattr(message, "message", None)
        name = type(message).__name__
        if isinstance(inner, msgspec.Struct):
            return f"{name}({self.describe(inner)})"
        parts = [
            str(getattr(message, part))
            for part in (
                "request_id",
                "attempt",
                "segment",
                "side",
                "valid",
                "committed",
                "pool_id",
            )
            if hasattr(message, part)
        ]
        return f"{name} {' '.join(parts)}".strip()


def _stale_copies(message: Message) -> list[Message]:
    """A hand-off's message as it would be from, or for, a pool of an earlier epoch."""
    if not isinstance(message, HandoffMessage):
        return []
    return [
        msgspec.structs.replace(message, **{name: getattr(message, name) - 1})
        for name in ("source_epoch", "target_epoch")
        if hasattr(message, name)
    ]
