"""Several requests of the tables alone (abstract.py) that share the blocks of two pools.

1. Every state of one request is visited; whatever a pool has to give is there. What is wrong with a
   request in company is wrong with it here as well, for the others can only make it wait.
2. Requests meet in nothing but free blocks. So states of a request are alike when they hold the
   same and can do the same, as far as others can tell (the coarsest strong bisimulation): classes.
3. The sorted classes of all requests are a state of the product, which is visited whole: nobody may
   be stuck who is not done, with the fewest blocks that there can be.
"""

import time
from collections import Counter
from dataclasses import dataclass

from bench.exploration.abstract import Lane, Request, moves, problem
from coordinator.records import State as InRecord
from kvcache.blocks import State as Block
from protocol.errors import IllegalTransition


@dataclass(frozen=True, slots=True)
class Graph:
    """All states of one request, by number; 0 is the first.

    ``ways[n]`` are (the block needed, whether it comes by itself, the state after).
    """

    states: tuple[Request, ...]
    ways: tuple[tuple[tuple[str, bool, int], ...], ...]
    problem: str = ""

    @property
    def num_steps(self) -> int:
        return sum(map(len, self.ways))


def graph_of(num_lanes: int) -> Graph:
    """One request with so many ranks on each side."""
    states = [Request((Lane(),) * num_lanes)]
    numbers = {states[0]: 0}
    ways: list[tuple[tuple[str, bool, int], ...]] = []
    for request in states:  # grows meanwhile
        try:
            found = list(moves(request))
        except IllegalTransition as error:
            return Graph(tuple(states), tuple(ways), f"{error}: {request}")
        for move in found:
            if move.after not in numbers:
                numbers[move.after] = len(states)
                states.append(move.after)
        ways.append(tuple((move.needs, move.is_own, numbers[move.after]) for move in found))
        wrong = problem(request)
        if not wrong and request.record is not InRecord.GONE:
            wrong = "" if any(move.is_own for move in found) else "stuck"
        if wrong:
            return Graph(tuple(states), tuple(ways), f"{wrong}: {request}")
    return Graph(tuple(states), tuple(ways))


def held(request: Request) -> tuple[int, int]:
    """Blocks of the prefill and of the decode pool."""
    free = Block.FREE
    return int(request.source_block is not free), int(request.target_block is not free)


def classes_of(graph: Graph) -> list[int]:
    """The class of each state."""
    numbers: dict[object, int] = {}
    classes = [
        numbers.setdefault((held(state), state.record is InRecord.GONE), len(numbers))
        for state in graph.states
    ]
    count = 0
    while count < len(numbers):
        count, numbers = len(numbers), {}
        seen = list(classes)
        for state, ways in enumerate(graph.ways):
            can = frozenset((needs, is_own, seen[after]) for needs, is_own, after in ways)
            classes[state] = numbers.setdefault((seen[state], can), len(numbers))
    return classes


@dataclass(frozen=True, slots=True)
class Together:
    """What several requests have come to."""

    num_states: int  # of one request
    num_classes: int
    num_products: int
    num_steps: int
    seconds: float
    problem: str = ""


def explore(num_lanes: int, num_requests: int, num_blocks: int = 1) -> Together:
    """Every state of so many requests.

    Args:
        num_lanes: ranks of each pool.
        num_requests: at one time.
        num_blocks: that each pool has; a request needs one of each.
    """
    started = time.monotonic()
    graph = graph_of(num_lanes)
    if graph.problem:
        seconds = time.monotonic() - started
        return Together(len(graph.states), 0, 0, graph.num_steps, seconds, graph.problem)
    product = _Product(graph, num_blocks)
    wrong = product.explore(num_requests)
    return Together(
        len(graph.states),
        len(product.ways),
        len(product.seen),
        product.num_steps,
        time.monotonic() - started,
        wrong,
    )


class _Product:
    def __init__(self, graph: Graph, num_blocks: int) -> None:
        classes = classes_of(graph)
        self._first = classes[0]
        self._num_blocks = num_blocks
        self.ways: dict[int, frozenset[tuple[str, bool, int]]] = {}
        self._held: dict[int, tuple[int, int]] = {}
        self._gone = set[int]()
        for number, ways in enumerate(graph.ways):
            own, state = classes[number], graph.states[number]
            self.ways[own] = frozenset((n, o, classes[after]) for n, o, after in ways)
            self._held[own] = held(state)
            if state.record is InRecord.GONE:
                self._gone.add(own)
        self.seen: set[tuple[int, ...]] = set()
        self.num_steps = 0

    def explore(self, num_requests: int) -> str:
        """Visit everything; what is wrong, if anything is."""
        first = (self._first,) * num_requests
        self.seen, todo = {first}, [first]
        while todo:
            state = todo.pop()
            is_stuck = True
            for after, is_own in self._after(state):
                self.num_steps += 1
                is_stuck &= not is_own
                if after not in self.seen:
                    self.seen.add(after)
                    todo.append(after)
            if is_stuck and not self._gone.issuperset(state):
                return f"stuck: {state}"
        return ""

    def _after(self, state: tuple[int, ...]) -> list[tuple[tuple[int, ...], bool]]:
        used = Counter[str]()
        for own in state:
            prefill, decode = self._held[own]
            used["prefill"] += prefill
            used["decode"] += decode
        assert max(used.values()) <= self._num_blocks, "a block has two owners"
        found = []
        for place, own in enumerate(state):
            if place and state[place - 1] == own:
                continue  # alike
            others = state[:place] + state[place + 1 :]
            for needs, is_own, after in self.ways[own]:
                if not needs or used[needs] < self._num_blocks:
                    found.append((tuple(sorted((*others, after))), is_own))
        return found
