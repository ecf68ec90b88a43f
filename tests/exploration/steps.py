"""The steps that are possible in rows, and what they change.

A row is a state of the whole cluster: the state of each node, the content of each link, how many
gangs may still die and how many messages may still come twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tests.exploration.automata import DEAD, EMPTY, Network
from tests.exploration.clusters import Life
from tests.exploration.inputs import (
    COORDINATOR,
    DONE,
    LAUNCHER,
    Compute,
    Computed,
    Died,
    LeaseEnds,
    Leave,
    ReadEnds,
    Submit,
)
from tests.exploration.leaders import rank_of
from tests.exploration.tables import NOT_POSSIBLE, Flags, Ints, Places, Tables

# Such a message commutes with whatever else can happen to its receiver before it comes, and nothing
# that is checked depends on it: it is taken before anything else happens.
AT_ONCE = (Compute, Computed)


class Kind(NamedTuple):
    """What happens, and to which link, node or life."""

    what: str  # "deliver", "repeat", "take" or "kill"
    which: int
    slot: int = 0


@dataclass(slots=True)
class Step:
    """One kind of step, of all rows that can take it."""

    kind: Kind
    where: Places  # these rows
    changes: list[tuple[int, Ints]]  # (column, its values after)
    effects: Ints | None = None

    def applied(self, rows: Ints, chosen: Places) -> Ints:
        """What some of them become; ``chosen`` are places in ``where``."""
        after = rows[self.where[chosen]]
        for column, values in self.changes:
            after[:, column] = values[chosen]
        return after


class Steps:
    """Of one case.

    Args:
        network: its automata.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.tables = Tables(network)
        self.num_nodes, self.num_links = len(network.automata), len(network.links)
        self._case = network.cluster.case
        self._deaths = self.num_nodes + self.num_links
        self._repeats = self._deaths + 1
        self._receivers = [network.node_at(to) for _, to in network.links]
        self._may_repeat = [self._is_repeated(*link) for link in network.links]
        self._is_at_once = np.zeros(64, np.bool_)  # by message
        self._num_known_messages = 0

    def _is_repeated(self, sender: str, receiver: str) -> bool:
        """Whether what is said there may come twice."""
        ranks = {rank for life in self.network.cluster.lives for rank in life.ranks}
        return ranks.issuperset({sender, receiver} - {COORDINATOR})

    def first(self) -> Ints:
        """The state in which all have come up."""
        links = [EMPTY] * self.num_links
        row = [*self.network.started(), *links, self._case.num_deaths, self._case.num_repeats]
        return np.array([row], np.int32)

    def of(self, rows: Ints) -> Iterator[Step]:
        """Every step that these rows can take."""
        waits = np.ones(len(rows), np.bool_)
        if self._case.reduces_order:
            for link in range(self.num_links):
                yield from self._at_once(rows, link, waits)
        where = np.flatnonzero(waits)
        for link in range(self.num_links):
            yield from self._deliveries(rows, link, where)
        for node in range(self.num_nodes):
            yield from self._options(rows, node, where)
        if self._case.num_deaths:
            yield from self._kills(rows, where)

    def is_own(self, step: Step, rows: Ints) -> Places:
        """The rows of a step for which it needs neither a fault nor a caller who leaves."""
        kind = step.kind
        if kind.what != "take":
            return step.where if kind.what == "deliver" else step.where[:0]
        options = self.network.automata[kind.which].options
        states = rows[step.where, kind.which]
        own = np.ones(len(states), np.bool_)
        for state in np.unique(states):
            option = options[state][kind.slot]
            if isinstance(option, Leave | LeaseEnds):
                own[states == state] = False
            elif isinstance(option, ReadEnds) and option.how != DONE:
                peers = rows[step.where, self.network.node_at(option.incarnation)]
                own[(states == state) & (peers != DEAD)] = False
        return step.where[own]

    # -- kinds of steps ----------------------------------------------------------------------------

    def _at_once(self, rows: Ints, link: int, waits: Flags) -> Iterator[Step]:
        """The first thing that is taken at once, for rows that have one."""
        column = self.num_nodes + link
        where = np.flatnonzero(waits & (rows[:, column] != EMPTY))
        if not len(where):
            return
        heads = self.tables.contents[link].heads(rows[where, column])
        while self._num_known_messages < len(self.network.messages):
            if self._num_known_messages == len(self._is_at_once):
                self._is_at_once = np.concatenate([self._is_at_once, self._is_at_once & False])
            message = self.network.messages[self._num_known_messages]
            self._is_at_once[self._num_known_messages] = isinstance(message, AT_ONCE)
            self._num_known_messages += 1
        where = where[self._is_at_once[heads]]
        if len(where):
            waits[where] = False
            yield self._delivery(rows, link, where)

    def _deliveries(self, rows: Ints, link: int, waiting: Places) -> Iterator[Step]:
        where = waiting[rows[waiting, self.num_nodes + link] != EMPTY]
        if not len(where):
            return
        step = self._delivery(rows, link, where)
        yield step
        if not self._may_repeat[link] or not self._case.num_repeats:
            return
        again = np.flatnonzero(rows[where, self._repeats])
        if len(again):
            changes = [
                (column, values[again])
                for column, values in step.changes
                if column != self.num_nodes + link
            ]
            changes.append((self._repeats, rows[where[again], self._repeats] - 1))
            effects = None if step.effects is None else step.effects[again]
            yield Step(Kind("repeat", link), where[again], changes, effects)

    def _delivery(self, rows: Ints, link: int, where: Places) -> Step:
        node, column = self._receivers[link], self.num_nodes + link
        contents = self.tables.contents[link]
        held = rows[where, column]
        effects = self.tables.deliveries(link, rows[where, node], contents.heads(held))
        changes = [(column, contents.tails(held)), *self._changes(rows, where, node, effects)]
        return Step(Kind("deliver", link), where, changes, effects)

    def _options(self, rows: Ints, node: int, waiting: Places) -> Iterator[Step]:
        options = self.network.automata[node].options
        states = rows[waiting, node]
        counts = np.array([len(of_state) for of_state in options], np.int32)[states]
        for slot in range(int(counts.max(initial=0))):
            has_one = counts > slot
            where, found = waiting[has_one], states[has_one]
            peers = self._peers(rows, where, node, slot)
            effects = self.tables.options(node, slot, found, peers)
            possible = effects != NOT_POSSIBLE
            if possible.any():
                where, effects = where[possible], effects[possible]
                changes = self._changes(rows, where, node, effects)
                yield Step(Kind("take", node, slot), where, changes, effects)

    def _peers(self, rows: Ints, where: Places, node: int, slot: int) -> Ints:
        """The state of the rank that an option reads from, DEAD for every other option."""
        peers = np.full(len(where), DEAD, np.int32)
        states = rows[where, node]
        options = self.network.automata[node].options
        sources: dict[str, list[int]] = {}
        for state in np.flatnonzero(np.bincount(states)):
            option = options[state][slot]
            if isinstance(option, ReadEnds):
                sources.setdefault(option.incarnation, []).append(int(state))
        for incarnation, reading in sources.items():
            chosen = np.isin(states, reading)
            peers[chosen] = rows[where[chosen], self.network.node_at(incarnation)]
        return peers

    def _kills(self, rows: Ints, waiting: Places) -> Iterator[Step]:
        cluster = self.network.cluster
        for number, life in enumerate(cluster.lives):
            if life.pool_id not in self._case.may_die:
                continue
            nodes = self._nodes_of(life)
            leader = self.network.node_at(life.ranks[0])
            has_started = self._started(leader)[rows[waiting, leader]]
            where = waiting[(rows[waiting, self._deaths] > 0) & has_started]
            if life.number > self._case.num_deaths or not len(where):
                continue  # the last life is spared
            none = np.zeros(len(where), np.int32)
            changes = [(self._deaths, rows[where, self._deaths] - 1)]
            changes += [(node, none + DEAD) for node in nodes]
            for link, receiver in enumerate(self._receivers):
                if receiver in nodes:
                    changes.append((self.num_nodes + link, none + EMPTY))
            changes.append(self._notice(rows, where, life))
            yield Step(Kind("kill", number), where, changes)

    def _started(self, leader: int) -> Flags:
        """By the states of a leader: whether it is there to be killed."""
        nodes = self.network.automata[leader].states
        flags = [node is not None and rank_of(node).has_started for node in nodes]
        return np.array(flags, np.bool_)

    def _notice(self, rows: Ints, where: Places, life: Life) -> tuple[int, Ints]:
        following = self.network.cluster.life_after(life)
        died = Died(life.pool_id, following.ranks if following else ())
        link = self.network.links.index((LAUNCHER, COORDINATOR))
        contents = self.tables.contents[link]
        word = contents.word((self.network.message_number(died),))
        column = self.num_nodes + link
        held = rows[where, column]
        return column, contents.join(held, np.full(len(where), word, np.int32))

    def _nodes_of(self, life: Life) -> list[int]:
        return sorted({self.network.node_at(name) for name in (life.main, *life.ranks)})

    def _changes(
        self, rows: Ints, where: Places, node: int, effects: Ints
    ) -> list[tuple[int, Ints]]:
        """What effects do to a node and to the links; what is said to the dead is nowhere."""
        changes = [(node, self.tables.states[effects])]
        for link, words in self.tables.said(effects):
            column = self.num_nodes + link
            values = rows[where, column]
            says = words != EMPTY
            if self._case.num_deaths:
                says &= rows[where, self._receivers[link]] != DEAD
            values[says] = self.tables.contents[link].join(values[says], words[says])
            changes.append((column, values))
        return changes

    # -- in words ----------------------------------------------------------------------------------

    def words(self, kind: Kind, row: Ints) -> str:
        """A step out of a row, for a trace."""
        network = self.network
        if kind.what == "kill":
            return f"{network.cluster.lives[kind.which].pool_id} is killed"
        if kind.what in ("deliver", "repeat"):
            sender, receiver = network.links[kind.which]
            content = self.tables.contents[kind.which].of[row[self.num_nodes + kind.which]]
            message = network.messages[content[0]]
            often = " (it will come again)" if kind.what == "repeat" else ""
            return f"{receiver} takes from {sender}: {network.describe(message)}{often}"
        automaton = network.automata[kind.which]
        option = automaton.options[int(row[kind.which])][kind.slot]
        match option:
            case ReadEnds():
                return f"{automaton.name}: a read from {option.incarnation} {option.how}"
            case Leave():
                return f"the caller of {option.request_id} leaves"
            case Submit():
                return "a caller comes"
        return f"{automaton.name}: {network.describe(option)}"
