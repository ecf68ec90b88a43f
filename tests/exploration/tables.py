"""Tables as arrays that are filled in as they are asked for, so that many rows are done at once."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tests.exploration.automata import EMPTY, Effect, Network

Ints = npt.NDArray[np.int32]
Digest = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]
NOT_POSSIBLE = -1
_UNKNOWN = -2


class PairTable:
    """A function of two small numbers.

    Args:
        find: called once for each pair that is met.
    """

    def __init__(self, find: Callable[[int, int], int]) -> None:
        self._find = find
        self._values = np.full((64, 64), _UNKNOWN, np.int32)

    def of(self, first: Ints, second: Ints) -> Ints:
        """The values of these pairs."""
        if not len(first):
            return np.zeros(0, np.int32)
        self._grow(int(first.max()), int(second.max()))
        values = self._values[first, second]
        unknown = values == _UNKNOWN
        if unknown.any():
            keys = first[unknown].astype(np.int64) << 32 | second[unknown]
            for key in np.unique(keys).tolist():
                pair = key >> 32, key & 0xFFFFFFFF
                self._values[pair] = self._find(*pair)
            values = self._values[first, second]
        return values

    def _grow(self, highest: int, other: int) -> None:
        rows, columns = self._values.shape
        if highest < rows and other < columns:
            return
        shape = (_power(highest + 1, rows), _power(other + 1, columns))
        values = np.full(shape, _UNKNOWN, np.int32)
        values[:rows, :columns] = self._values
        self._values = values


def _power(needed: int, size: int) -> int:
    while size < needed:
        size *= 2
    return size


class Contents:
    """What can be on one link: sequences of messages by number; 0 is the empty one."""

    def __init__(self) -> None:
        self.of: list[tuple[int, ...]] = [()]
        self._numbers: dict[tuple[int, ...], int] = {(): EMPTY}
        self._ends = np.zeros((2, 1), np.int32)  # the first message, the content without it
        self._words: list[tuple[int, ...]] = [()]
        self._word_numbers: dict[tuple[int, ...], int] = {(): EMPTY}
        self._joined = PairTable(lambda a, b: self.number(self.of[a] + self._words[b]))

    def number(self, messages: tuple[int, ...]) -> int:
        known = self._numbers.get(messages)
        if known is None:
            known = self._numbers[messages] = len(self.of)
            self.of.append(messages)
        return known

    def word(self, messages: tuple[int, ...]) -> int:
        """The number of what is said at one time; 0 is nothing."""
        known = self._word_numbers.get(messages)
        if known is None:
            known = self._word_numbers[messages] = len(self._words)
            self._words.append(messages)
        return known

    def heads(self, contents: Ints) -> Ints:
        """The first message of each, none of them being empty."""
        return self._known_ends()[0, contents]  # type: ignore[no-any-return]

    def tails(self, contents: Ints) -> Ints:
        """Each without its first message."""
        return self._known_ends()[1, contents]  # type: ignore[no-any-return]

    def _known_ends(self) -> Ints:
        known = self._ends.shape[1]
        if known < len(self.of):
            more: list[tuple[int, int]] = []
            while known + len(more) < len(self.of):  # tails are contents too
                messages = self.of[known + len(more)]
                more.append((messages[0], self.number(messages[1:])))
            self._ends = np.concatenate([self._ends, np.array(more, np.int32).T], axis=1)
        return self._ends

    def join(self, contents: Ints, words: Ints) -> Ints:
        """Each with the messages of a word behind its own."""
        return self._joined.of(contents, words)


class Tables:
    """What every input that was met so far does, and to what.

    Args:
        network: computes what is not known yet.
    """

    def __init__(self, network: Network) -> None:
        num_links = len(network.links)
        self.contents = [Contents() for _ in range(num_links)]
        self.problems: list[str] = []
        self.states = np.zeros(1024, np.int32)  # by effect: the node's next state
        self._words = np.zeros((1024, num_links), np.int32)
        self._said: list[frozenset[int]] = []  # by effect: the links on which something is said
        self._deliveries = [self._of_link(link) for link in range(num_links)]
        self._options: dict[tuple[int, int], PairTable] = {}
        self._network = network

    def _of_link(self, link: int) -> PairTable:
        def find(state: int, message: int) -> int:
            return self._add(self._network.deliver(link, state, message))

        return PairTable(find)

    def deliveries(self, link: int, states: Ints, messages: Ints) -> Ints:
        """The effect of each message that comes over a link on its receiver's state."""
        return self._deliveries[link].of(states, messages)

    def options(self, node: int, slot: int, states: Ints, peers: Ints) -> Ints:
        """The effect of an option on each state, NOT_POSSIBLE where there is none."""
        table = self._options.get((node, slot))
        if table is None:
            table = self._options[node, slot] = PairTable(
                lambda state, peer: self._add(self._network.take(node, state, slot, peer))
            )
        return table.of(states, peers)

    def _add(self, effect: Effect | None) -> int:
        if effect is None:
            return NOT_POSSIBLE
        number = len(self.problems)
        if number == len(self.states):
            self.states = np.concatenate([self.states, np.zeros_like(self.states)])
            self._words = np.concatenate([self._words, np.zeros_like(self._words)])
        self.problems.append(effect.problem)
        self.states[number] = effect.state
        for link, messages in effect.said:
            self._words[number, link] = self.contents[link].word(messages)
        return number

    def said(self, effects: Ints) -> list[tuple[int, Ints]]:
        """(link, the word for each) of the links on which any of these effects says something."""
        words = self._words[effects]
        return [(int(link), words[:, link]) for link in np.flatnonzero(words.any(axis=0))]


class Digests:
    """A 64-bit digest of each row: the exclusive or of a random number for each of its cells."""

    def __init__(self, width: int) -> None:
        self._random = np.random.default_rng(2026)
        self._numbers = [self._draw(1024) for _ in range(width)]

    def _draw(self, count: int) -> Digest:
        return self._random.integers(0, 1 << 64, count, np.uint64, endpoint=False)

    def cells(self, column: int, values: Ints) -> Digest:
        """What the values of a column add."""
        numbers = self._numbers[column]
        while int(values.max(initial=0)) >= len(numbers):
            numbers = self._numbers[column] = np.concatenate([numbers, self._draw(len(numbers))])
        return numbers[values]

    def of(self, rows: Ints) -> Digest:
        found = np.zeros(len(rows), np.uint64)
        for column in range(rows.shape[1]):
            found ^= self.cells(column, rows[:, column])
        return found


class Visited:
    """A growing set of digests, kept in one array with open addresses."""

    def __init__(self) -> None:
        self._table = np.zeros(1 << 16, np.uint64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, digests: Digest) -> Places:
        """Add these; where those stand that are new, each once."""
        while 2 * (self._count + len(digests)) > len(self._table):
            held = self._table[self._table != 0]
            self._table = np.zeros(2 * len(self._table), np.uint64)
            self._insert(held)
        new = self._insert(np.maximum(digests, np.uint64(1)))
        _, first = np.unique(digests[new], return_index=True)
        self._count += len(first)
        return new[first]

    def _insert(self, digests: Digest) -> Places:
        """Where new ones stand, equal ones more than once."""
        table, mask = self._table, np.uint64(len(self._table) - 1)
        places = (digests & mask).astype(np.int64)
        pending = np.arange(len(digests))
        new = np.zeros(len(digests), np.bool_)
        while len(pending):
            wanted, at = digests[pending], places[pending]
            held = table[at]
            is_free = held == 0
            table[at[is_free]] = wanted[is_free]  # of several that want a place, one gets it
            has_it = table[at] == wanted
            new[pending[is_free & has_it]] = True
            pending = pending[~has_it]
            places[pending] = (places[pending] + 1) & int(mask)
        return np.flatnonzero(new)
