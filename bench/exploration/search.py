"""Breadth first through all states of a case, level by level, until there is no new one.

1. Every row of a level takes every step that is possible in it. What is new makes the next level.
2. In every new state the checks hold (checks.py); a state without a step that somebody takes by
   itself must be an end, in which nothing is held for anybody.
3. The first state in which something is wrong is as near to the beginning as any: the steps that
   lead there are told in words.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bench.exploration.automata import DEAD, EMPTY, Network
from bench.exploration.callers import Died, Leave, Submit
from bench.exploration.checks import Checks
from bench.exploration.clusters import LAUNCHER, Case, Cluster, Life
from bench.exploration.ranks import COORDINATOR, LeaseEnds, ReadEnds
from bench.exploration.tables import NOT_POSSIBLE, Digests, Ints, Tables, Visited

CHUNK_ROWS = 1 << 16
MAX_SLOTS = 64


class Kind(NamedTuple):
    """A kind of step: ``what`` happens at a link, a node or a life, by number."""

    what: str  # "deliver", "repeat", "take" or "kill"
    which: int
    slot: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """What an exploration has come to."""

    num_states: int
    num_steps: int
    depth: int
    num_ends: int
    seconds: float
    is_complete: bool
    problem: str = ""
    trace: tuple[str, ...] = ()
    local_states: tuple[tuple[str, int], ...] = ()
    num_computed: int = 0

    @property
    def collision_odds(self) -> float:
        """That any two states had the same digest."""
        return self.num_states**2 / 2.0**65


@dataclass(slots=True)
class _Level:
    rows: Ints
    parents: npt.NDArray[np.int32]  # in the level before
    kinds: npt.NDArray[np.int16]


@dataclass(slots=True)
class _Past:
    """Of each level, how its states came about."""

    parents: list[npt.NDArray[np.int32]] = field(default_factory=list)
    kinds: list[npt.NDArray[np.int16]] = field(default_factory=list)


@dataclass(slots=True)
class _Problem:
    text: str
    parent: int  # in the present level
    kind: int  # of the step out of it; -1 if it is wrong itself


class Search:
    """One case.

    Args:
        case: what is explored.
        max_states: where to give up.
    """

    def __init__(self, case: Case, max_states: int = 1 << 62) -> None:
        self._case = case
        self._max_states = max_states
        self._cluster = Cluster(case)
        self._network = Network(self._cluster)
        nodes = self._network.started()
        self._num_nodes, self._num_links = len(nodes), len(self._network.links)
        self._deaths = self._num_nodes + self._num_links  # columns
        self._repeats = self._deaths + 1
        first = [*nodes, *[EMPTY] * self._num_links, case.num_deaths, case.num_repeats]
        self._first: Ints = np.array([first], np.int32)
        self._tables = Tables(self._network)
        self._digests = Digests(len(first))
        self._visited = Visited()
        self._checks = Checks(self._network)
        self._kinds: list[Kind] = []
        self._kind_numbers: dict[Kind, int] = {}
        self._receivers = [self._network.node_at(to) for _, to in self._network.links]
        self._may_repeat = [self._is_between_ranks(*link) for link in self._network.links]

    def _is_between_ranks(self, sender: str, receiver: str) -> bool:
        ranks = {rank for life in self._cluster.lives for rank in life.ranks}
        return sender in ranks and receiver in ranks

    # -- the search --------------------------------------------------------------------------------

    def run(self) -> Found:
        """Explore until there is nothing new, or something is wrong, or it is too much."""
        started = time.monotonic()
        past = _Past()
        num_steps = num_ends = depth = 0
        level = _Level(self._first, np.zeros(1, np.int32), np.zeros(1, np.int16))
        self._visited.add(self._digests.of(self._first))
        problem = None
        while len(level.rows) and problem is None and len(self._visited) <= self._max_states:
            past.parents.append(level.parents)
            past.kinds.append(level.kinds)
            level, steps, ends, problem = self._next(level.rows)
            num_steps, num_ends, depth = num_steps + steps, num_ends + ends, depth + 1
        trace = () if problem is None else tuple(self._trace(past, problem))
        sizes = ((a.name, len(a.states) - 1) for a in self._network.automata)
        return Found(
            num_states=len(self._visited),
            num_steps=num_steps,
            depth=depth - 1,
            num_ends=num_ends,
            seconds=time.monotonic() - started,
            is_complete=problem is None and not len(level.rows),
            problem="" if problem is None else problem.text,
            trace=trace,
            local_states=tuple(sizes),
            num_computed=self._network.num_computed,
        )

    def _next(self, rows: Ints) -> tuple[_Level, int, int, _Problem | None]:
        """The level after; how many steps lead out of this one, and how many of it are ends."""
        parts: list[_Level] = []
        num_steps = num_ends = 0
        problem = None
        for first in range(0, len(rows), CHUNK_ROWS):
            chunk = rows[first : first + CHUNK_ROWS]
            goes_on = np.zeros(len(chunk), np.bool_)
            for kind, where, after, effects in self._steps(chunk):
                num_steps += len(where)
                goes_on[where[self._is_own(kind, chunk[where])]] = True
                number = self._number(kind)
                problem = problem or self._wrong_step(effects, where + first, number)
                new = self._new(after)
                if len(new):
                    problem = problem or self._wrong_state(after[new], where[new] + first, number)
                    kinds = np.full(len(new), number, np.int16)
                    parents = (where[new] + first).astype(np.int32)
                    parts.append(_Level(after[new], parents, kinds))
            ends = np.flatnonzero(~goes_on)
            num_ends += len(ends)
            problem = problem or self._wrong_end(chunk[ends], ends + first)
            if problem is not None:
                break
        return self._joined(parts), num_steps, num_ends, problem

    def _joined(self, parts: list[_Level]) -> _Level:
        if not parts:
            none = np.zeros((0, self._first.shape[1]), np.int32)
            return _Level(none, np.zeros(0, np.int32), np.zeros(0, np.int16))
        return _Level(
            np.concatenate([part.rows for part in parts]),
            np.concatenate([part.parents for part in parts]),
            np.concatenate([part.kinds for part in parts]),
        )

    def _new(self, rows: Ints) -> npt.NDArray[np.intp]:
        """Which of these rows have never been seen, each once; from now on they have."""
        digests, places = np.unique(self._digests.of(rows), return_index=True)
        lacking = self._visited.lacks(digests)
        self._visited.add(digests[lacking])
        return places[lacking]

    # -- steps -------------------------------------------------------------------------------------

    def _steps(
        self, rows: Ints
    ) -> Iterator[tuple[Kind, npt.NDArray[np.intp], Ints, Ints | None]]:
        """(kind, the rows that can take it, what they become, by which effects)."""
        for link in range(self._num_links):
            yield from self._deliveries(rows, link)
        for node in range(self._num_nodes):
            yield from self._options(rows, node)
        yield from self._deaths_of(rows)

    def _deliveries(
        self, rows: Ints, link: int
    ) -> Iterator[tuple[Kind, npt.NDArray[np.intp], Ints, Ints | None]]:
        node, column = self._receivers[link], self._num_nodes + link
        where = np.flatnonzero(rows[:, column])
        if not len(where):
            return
        found = rows[where]
        contents = self._tables.contents
        effects = self._tables.deliveries(link, found[:, node], contents.heads(found[:, column]))
        after = found.copy()
        after[:, column] = contents.tails(found[:, column])
        self._apply(after, effects, node)
        yield Kind("deliver", link), where, after, effects
        again = np.flatnonzero(found[:, self._repeats]) if self._may_repeat[link] else []
        if len(again):
            after = found[again].copy()
            after[:, self._repeats] -= 1
            self._apply(after, effects[again], node)
            yield Kind("repeat", link), where[again], after, effects[again]

    def _options(
        self, rows: Ints, node: int
    ) -> Iterator[tuple[Kind, npt.NDArray[np.intp], Ints, Ints | None]]:
        options = self._network.automata[node].options
        states = rows[:, node]
        counts = np.array([len(of_state) for of_state in options], np.int32)[states]
        for slot in range(int(counts.max(initial=0))):
            where = np.flatnonzero(counts > slot)
            found = rows[where]
            effects = self._tables.options(node, slot, found[:, node], self._peers(found, node, slot))
            possible = np.flatnonzero(effects != NOT_POSSIBLE)
            if len(possible):
                after = found[possible]
                self._apply(after, effects[possible], node)
                yield Kind("take", node, slot), where[possible], after, effects[possible]

    def _peers(self, rows: Ints, node: int, slot: int) -> Ints:
        """The state of the rank that an option reads from, DEAD for every other option."""
        peers = np.full(len(rows), DEAD, np.int32)
        options = self._network.automata[node].options
        for state in np.unique(rows[:, node]):
            option = options[state][slot]
            if isinstance(option, ReadEnds):
                chosen = rows[:, node] == state
                peers[chosen] = rows[chosen, self._network.node_at(option.incarnation)]
        return peers

    def _deaths_of(
        self, rows: Ints
    ) -> Iterator[tuple[Kind, npt.NDArray[np.intp], Ints, Ints | None]]:
        for number, life in enumerate(self._cluster.lives):
            if life.pool_id not in self._case.mortal or life.number > self._case.num_deaths:
                continue
            nodes = self._nodes_of(life)
            where = np.flatnonzero((rows[:, self._deaths] > 0) & (rows[:, nodes[0]] != DEAD))
            if len(where):
                after = rows[where]
                after[:, self._deaths] -= 1
                after[:, nodes] = DEAD
                following = self._cluster.life_after(life)
                died = Died(life.pool_id, following.ranks if following else ())
                message = self._network.message_number(died)
                link = self._network.links.index((LAUNCHER, COORDINATOR))
                column = self._num_nodes + link
                contents = self._tables.contents
                word = np.full(len(after), contents.number((message,)), np.int32)
                after[:, column] = contents.join(after[:, column], word)
                self._silence(after)
                yield Kind("kill", number), where, after, None

    def _nodes_of(self, life: Life) -> list[int]:
        return sorted({self._network.node_at(name) for name in (life.main, *life.ranks)})

    def _apply(self, rows: Ints, effects: Ints, node: int) -> None:
        self._tables.effects.apply(rows, effects, node, self._num_nodes)
        self._silence(rows)

    def _silence(self, rows: Ints) -> None:
        """What is sent to somebody who is dead is nowhere."""
        if not self._case.num_deaths:
            return
        for link, node in enumerate(self._receivers):
            dead = rows[:, node] == DEAD
            rows[dead, self._num_nodes + link] = EMPTY

    def _is_own(self, kind: Kind, rows: Ints) -> npt.NDArray[np.bool_]:
        """Whether it happens without a fault and without a caller who leaves."""
        if kind.what != "take":
            return np.full(len(rows), kind.what == "deliver")
        options = self._network.automata[kind.which].options
        own = np.ones(len(rows), np.bool_)
        for state in np.unique(rows[:, kind.which]):
            option = options[state][kind.slot]
            if isinstance(option, Leave | LeaseEnds):
                own[rows[:, kind.which] == state] = False
            elif isinstance(option, ReadEnds) and not option.is_done:
                peers = rows[:, self._network.node_at(option.incarnation)]
                own[(rows[:, kind.which] == state) & (peers != DEAD)] = False
        return own

    def _number(self, kind: Kind) -> int:
        known = self._kind_numbers.get(kind)
        if known is None:
            known = self._kind_numbers[kind] = len(self._kinds)
            self._kinds.append(kind)
        return known

    # -- what is wrong -----------------------------------------------------------------------------

    def _wrong_step(
        self, effects: Ints | None, where: npt.NDArray[np.intp], kind: int
    ) -> _Problem | None:
        if effects is None:
            return None
        for effect in np.unique(effects):
            text = self._tables.effects.problems[effect]
            if text:
                return _Problem(text, int(where[np.argmax(effects == effect)]), kind)
        return None

    def _wrong_state(
        self, rows: Ints, where: npt.NDArray[np.intp], kind: int
    ) -> _Problem | None:
        found = self._checks.first_wrong(rows)
        return None if found is None else _Problem(found[1], int(where[found[0]]), kind)

    def _wrong_end(self, rows: Ints, where: npt.NDArray[np.intp]) -> _Problem | None:
        links = slice(self._num_nodes, self._num_nodes + self._num_links)
        for row, place in zip(rows, where, strict=True):
            text = self._checks.wrong_end(row, bool(row[links].any()))
            if text:
                return _Problem(text, int(place), -1)
        return None

    # -- in words ----------------------------------------------------------------------------------

    def _trace(self, past: _Past, problem: _Problem) -> Iterator[str]:
        """The steps that lead to a problem."""
        kinds = [] if problem.kind < 0 else [problem.kind]
        place = problem.parent
        for parents, of_level in zip(past.parents[:0:-1], past.kinds[:0:-1], strict=True):
            kinds.append(int(of_level[place]))
            place = int(parents[place])
        rows = self._first
        for kind in (self._kinds[number] for number in reversed(kinds)):
            yield self._words(kind, rows[0])
            rows = next(after for other, _, after, _ in self._steps(rows) if other == kind)

    def _words(self, kind: Kind, row: Ints) -> str:
        network = self._network
        if kind.what == "kill":
            return f"{self._cluster.lives[kind.which].pool_id} is killed"
        if kind.what in ("deliver", "repeat"):
            sender, receiver = network.links[kind.which]
            content = row[self._num_nodes + kind.which]
            message = network.messages[self._tables.contents.of[content][0]]
            often = " (it will come again)" if kind.what == "repeat" else ""
            return f"{receiver} takes from {sender}: {network.describe(message)}{often}"
        automaton = network.automata[kind.which]
        option = automaton.options[row[kind.which]][kind.slot]
        match option:
            case ReadEnds():
                how = "ends" if option.is_done else "fails"
                return f"{automaton.name}: a read from {option.incarnation} {how}"
            case Leave():
                return f"the caller of {option.request_id} leaves"
            case Submit():
                return "a caller comes"
        return f"{automaton.name}: {network.describe(option)}"
