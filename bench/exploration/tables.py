"""The tables of the automata as arrays, so that many rows take a step at once.

A row is a state of the whole cluster: nodes, then links, then what is left of the faults. The
content of a link is the number of a sequence of messages; taking the first off it and adding to its
end are tables as well.
"""

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from bench.exploration.automata import EMPTY, Effect, Network

Ints = npt.NDArray[np.int32]
NOT_POSSIBLE = -1


class Contents:
    """Sequences of messages by number; 0 is the empty one."""

    def __init__(self) -> None:
        self.of: list[tuple[int, ...]] = [()]
        self._numbers: dict[tuple[int, ...], int] = {(): EMPTY}
        self._joined: dict[tuple[int, int], int] = {}
        self._heads = np.zeros(1, np.int32)
        self._tails = np.zeros(1, np.int32)

    def number(self, messages: tuple[int, ...]) -> int:
        known = self._numbers.get(messages)
        if known is None:
            known = self._numbers[messages] = len(self.of)
            self.of.append(messages)
        return known

    def heads(self, contents: Ints) -> Ints:
        """The first message of each, none of them being empty."""
        self._grow()
        return self._heads[contents]

    def tails(self, contents: Ints) -> Ints:
        """Each without its first message."""
        self._grow()
        return self._tails[contents]

    def _grow(self) -> None:
        first = len(self._heads)
        if first == len(self.of):
            return
        tails = [self.number(messages[1:]) for messages in self.of[first:]]
        while first + len(tails) < len(self.of):  # tails are contents too
            tails.append(self.number(self.of[first + len(tails)][1:]))
        heads = [messages[0] for messages in self.of[first:]]
        self._heads = np.concatenate([self._heads, np.array(heads, np.int32)])
        self._tails = np.concatenate([self._tails, np.array(tails, np.int32)])

    def join(self, contents: Ints, words: Ints) -> Ints:
        """Each with the messages of a word behind its own."""
        return each_pair(contents, words, self._join)

    def _join(self, content: int, word: int) -> int:
        known = self._joined.get((content, word))
        if known is None:
            known = self._joined[content, word] = self.number(self.of[content] + self.of[word])
        return known


def each_pair(first: Ints, second: Ints, find: Callable[[int, int], int]) -> Ints:
    """``find`` of each pair, called once for each different one."""
    keys = first.astype(np.int64) << 32 | second
    pairs, where = np.unique(keys, return_inverse=True)
    found = [find(int(pair >> 32), int(pair & 0xFFFFFFFF)) for pair in pairs]
    return np.array(found, np.int32)[where]


class Effects:
    """What inputs do, by number: the node's next state, and a word for each link."""

    def __init__(self, contents: Contents, num_links: int) -> None:
        self.problems: list[str] = []
        self._contents = contents
        self._states = np.zeros(1024, np.int32)
        self._words = np.zeros((1024, num_links), np.int32)

    def add(self, effect: Effect) -> int:
        number = len(self.problems)
        self.problems.append(effect.problem)
        if number == len(self._states):
            self._states = np.concatenate([self._states, np.zeros_like(self._states)])
            self._words = np.concatenate([self._words, np.zeros_like(self._words)])
        self._states[number] = effect.state
        for link, messages in effect.said:
            self._words[number, link] = self._contents.number(messages)
        return number

    def apply(self, rows: Ints, effects: Ints, node: int, first_link: int) -> None:
        """Change rows in place."""
        rows[:, node] = self._states[effects]
        words = self._words[effects]
        for link in np.flatnonzero(words.any(axis=0)):
            said = np.flatnonzero(words[:, link])
            column = first_link + link
            rows[said, column] = self._contents.join(rows[said, column], words[said, link])


class Tables:
    """Effects of every input met so far.

    Args:
        network: computes what is not known yet.
    """

    def __init__(self, network: Network) -> None:
        self.contents = Contents()
        self.effects = Effects(self.contents, len(network.links))
        self._network = network
        self._deliveries: dict[tuple[int, int, int], int] = {}
        self._options: dict[tuple[int, int, int, int], int] = {}

    def deliveries(self, link: int, states: Ints, messages: Ints) -> Ints:
        """The effect of each message that comes over a link on its receiver's state."""

        def find(state: int, message: int) -> int:
            key = (link, state, message)
            known = self._deliveries.get(key)
            if known is None:
                effect = self._network.deliver(link, state, message)
                known = self._deliveries[key] = self.effects.add(effect)
            return known

        return each_pair(states, messages, find)

    def options(self, node: int, slot: int, states: Ints, peers: Ints) -> Ints:
        """The effect of an option on each state, NOT_POSSIBLE where there is none."""

        def find(state: int, peer: int) -> int:
            key = (node, slot, state, peer)
            known = self._options.get(key)
            if known is None:
                effect = self._network.take(node, state, slot, peer)
                number = NOT_POSSIBLE if effect is None else self.effects.add(effect)
                known = self._options[key] = number
            return known

        return each_pair(states, peers, find)


class Digests:
    """A 64-bit digest of each row: the exclusive or of a random number for each of its cells."""

    def __init__(self, width: int) -> None:
        self._random = np.random.default_rng(20_26)
        self._numbers = [self._draw(1024) for _ in range(width)]

    def _draw(self, count: int) -> npt.NDArray[np.uint64]:
        return self._random.integers(0, 1 << 64, count, np.uint64)

    def of(self, rows: Ints) -> npt.NDArray[np.uint64]:
        found = np.zeros(len(rows), np.uint64)
        for column, numbers in enumerate(self._numbers):
            cells = rows[:, column]
            highest = int(cells.max(initial=0))
            while highest >= len(numbers):
                numbers = np.concatenate([numbers, self._draw(len(numbers))])
                self._numbers[column] = numbers
            found ^= numbers[cells]
        return found


class Visited:
    """A growing set of digests, in sorted runs of which each is more than twice the next."""

    def __init__(self) -> None:
        self._runs: list[npt.NDArray[np.uint64]] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def lacks(self, digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Which of these are not in it."""
        lacking = np.ones(len(digests), np.bool_)
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, digests), len(run) - 1)
            lacking &= run[places] != digests
        return lacking

    def add(self, digests: Iterable[np.uint64] | npt.NDArray[np.uint64]) -> None:
        """Add what it lacks, in ascending order."""
        run = np.asarray(digests, np.uint64)
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")
        if len(run):
            self._runs.append(run)
