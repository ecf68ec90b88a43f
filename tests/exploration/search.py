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

import numpy as np
import numpy.typing as npt

from tests.exploration.automata import Network
from tests.exploration.checks import Checks
from tests.exploration.clusters import Case, Cluster
from tests.exploration.steps import Kind, Step, Steps
from tests.exploration.tables import Digest, Digests, Ints, Places, Visited

CHUNK_ROWS = 1 << 16
NO_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True)
class Found:
    """What an exploration has come to."""

    num_states: int
    num_steps: int
    depth: int  # steps to the farthest state
    num_ends: int
    seconds: float
    is_complete: bool  # every state has been left by every step that there is
    problem: str = ""
    trace: tuple[str, ...] = ()
    num_local_states: tuple[tuple[str, int], ...] = ()  # of each node
    num_computed: int = 0  # inputs that were given to real objects

    @property
    def collision_odds(self) -> float:
        """That any two states had the same digest, so that one was left out."""
        return self.num_states**2 / 2.0**65


@dataclass(slots=True)
class _Level:
    """The states of a depth, and by which step each was met."""

    rows: Ints
    digests: Digest
    parents: npt.NDArray[np.int32]  # in the level before
    kinds: npt.NDArray[np.int16]


@dataclass(slots=True)
class _Problem:
    text: str
    parent: int  # in the present level
    kind: int | None  # of the step out of it; None if it is wrong itself


@dataclass(slots=True)
class _Tally:
    num_steps: int = 0
    num_ends: int = 0
    problem: _Problem | None = None
    past: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int16]]] = field(default_factory=list)

    def blame(self, problem: _Problem | None) -> None:
        self.problem = self.problem or problem


class Search:
    """One case.

    Args:
        case: what is explored.
        max_states: where to give up.
    """

    def __init__(self, case: Case, max_states: int = NO_LIMIT) -> None:
        self._max_states = max_states
        self._network = Network(Cluster(case))
        self._steps = Steps(self._network)
        self._first = self._steps.first()
        self._digests = Digests(self._first.shape[1])
        self._visited = Visited()
        self._checks = Checks(self._network)
        self._kinds: list[Kind] = []
        self._numbers: dict[Kind, int] = {}

    def run(self) -> Found:
        """Explore until there is nothing new, or something is wrong, or it is too much."""
        started = time.monotonic()
        tally = _Tally()
        digests = self._digests.of(self._first)
        level = _Level(self._first, digests, np.zeros(1, np.int32), np.zeros(1, np.int16))
        self._visited.add(digests)
        while len(level.rows) and not tally.problem and len(self._visited) <= self._max_states:
            tally.past.append((level.parents, level.kinds))
            level = self._next(level, tally)
        sizes = ((a.name, len(a.states) - 1) for a in self._network.automata)
        return Found(
            num_states=len(self._visited),
            num_steps=tally.num_steps,
            depth=len(tally.past) - 1,
            num_ends=tally.num_ends,
            seconds=time.monotonic() - started,
            is_complete=not tally.problem and not len(level.rows),
            problem=tally.problem.text if tally.problem else "",
            trace=tuple(self._trace(tally)),
            num_local_states=tuple(sizes),
            num_computed=self._network.num_computed,
        )

    def _next(self, level: _Level, tally: _Tally) -> _Level:
        """The level after this one."""
        parts = [_Level(self._first[:0], *_NOBODY)]
        for first in range(0, len(level.rows), CHUNK_ROWS):
            chunk = slice(first, first + CHUNK_ROWS)
            rows, digests = level.rows[chunk], level.digests[chunk]
            goes_on = np.zeros(len(rows), np.bool_)
            for step in self._steps.of(rows):
                tally.num_steps += len(step.where)
                goes_on[self._steps.is_own(step, rows)] = True
                tally.blame(self._wrong_step(step, first))
                part = self._new(step, rows, digests, first)
                if len(part.rows):
                    tally.blame(self._wrong_state(part))
                    parts.append(part)
            ends = np.flatnonzero(~goes_on)
            tally.num_ends += len(ends)
            tally.blame(self._wrong_end(rows[ends], ends + first))
            if tally.problem:
                break
        return _Level(
            np.concatenate([part.rows for part in parts]),
            np.concatenate([part.digests for part in parts]),
            np.concatenate([part.parents for part in parts]),
            np.concatenate([part.kinds for part in parts]),
        )

    def _new(self, step: Step, rows: Ints, digests: Digest, first: int) -> _Level:
        """What a step makes of some rows and has never been seen."""
        after = digests[step.where]
        for column, values in step.changes:
            after ^= self._digests.cells(column, rows[step.where, column])
            after ^= self._digests.cells(column, values)
        new = self._visited.add(after)
        parents = (step.where[new] + first).astype(np.int32)
        kinds = np.full(len(new), self._number(step.kind), np.int16)
        return _Level(step.applied(rows, new), after[new], parents, kinds)

    def _number(self, kind: Kind) -> int:
        known = self._numbers.get(kind)
        if known is None:
            known = self._numbers[kind] = len(self._kinds)
            self._kinds.append(kind)
        return known

    # -- what is wrong -----------------------------------------------------------------------------

    def _wrong_step(self, step: Step, first: int) -> _Problem | None:
        if step.effects is None:
            return None
        problems = self._steps.tables.problems
        for effect in np.flatnonzero(np.bincount(step.effects)):
            if problems[effect]:
                place = int(step.where[np.argmax(step.effects == effect)]) + first
                return _Problem(problems[effect], place, self._number(step.kind))
        return None

    def _wrong_state(self, part: _Level) -> _Problem | None:
        found = self._checks.first_wrong(part.rows)
        if found is None:
            return None
        return _Problem(found[1], int(part.parents[found[0]]), int(part.kinds[found[0]]))

    def _wrong_end(self, rows: Ints, places: Places) -> _Problem | None:
        nodes, links = self._steps.num_nodes, self._steps.num_links
        for row, place in zip(rows, places, strict=True):
            text = self._checks.wrong_end(row, bool(row[nodes : nodes + links].any()))
            if text:
                return _Problem(text, int(place), None)
        return None

    def _trace(self, tally: _Tally) -> Iterator[str]:
        """The steps that lead to a problem, in words."""
        problem = tally.problem
        if problem is None:
            return
        kinds = [] if problem.kind is None else [problem.kind]
        place = problem.parent
        for parents, of_level in tally.past[:0:-1]:
            kinds.append(int(of_level[place]))
            place = int(parents[place])
        rows, one = self._first, np.zeros(1, np.intp)
        for kind in (self._kinds[number] for number in reversed(kinds)):
            yield self._steps.words(kind, rows[0])
            step = next(step for step in self._steps.of(rows) if step.kind == kind)
            rows = step.applied(rows, one)


_NOBODY = (np.zeros(0, np.uint64), np.zeros(0, np.int32), np.zeros(0, np.int16))
