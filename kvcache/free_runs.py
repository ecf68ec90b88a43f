"""The free ids of a pool as maximal runs of neighbours, so that allocations come out in one piece.

Adjacent blocks are joined into one descriptor of a transfer and one call of a kernel.
"""

import bisect


class FreeRuns:
    """A set of integers from ``range(size)``, kept as maximal runs. Starts full.

    Adding and taking cost O(1) and the number of different run lengths, not of free ids.
    """

    def __init__(self, size: int) -> None:
        self._length_of: dict[int, int] = {}  # first id of a run -> its length
        self._first_of: dict[int, int] = {}  # last id of a run -> its first
        self._starts: dict[int, dict[int, None]] = {}  # length -> first ids (an ordered set)
        self._lengths: list[int] = []  # the keys of _starts, ascending
        self._count = 0
        if size:
            self._insert(0, size)

    def __len__(self) -> int:
        return self._count

    def add(self, block_id: int) -> None:
        """Add an id that is not in the set, joining it to its neighbours."""
        start = block_id
        length = 1
        before = self._first_of.get(block_id - 1)
        if before is not None:
            length += self._remove(before)
            start = before
        if block_id + 1 in self._length_of:
            length += self._remove(block_id + 1)
        self._insert(start, length)

    def take(self, count: int, after: int | None = None) -> list[int]:
        """Remove and return ``count`` ids, at most ``len(self)``, in as few runs as is simple.

        First the ids that follow ``after``, when they are free; then the shortest run that holds
        all of the rest, and while there is none the longest run.
        """
        taken: list[int] = []
        if after is not None and after + 1 in self._length_of:
            self._take_from(after + 1, count, taken)
        while len(taken) < count:
            index = bisect.bisect_left(self._lengths, count - len(taken))
            length = self._lengths[min(index, len(self._lengths) - 1)]
            self._take_from(next(reversed(self._starts[length])), count, taken)
        return taken

    def runs(self) -> list[tuple[int, int]]:
        """Every run as (first id, length), ascending."""
        return sorted(self._length_of.items())

    def _take_from(self, start: int, count: int, taken: list[int]) -> None:
        length = self._remove(start)
        used = min(length, count - len(taken))
        taken.extend(range(start, start + used))
        if used < length:
            self._insert(start + used, length - used)

    def _insert(self, start: int, length: int) -> None:
        self._length_of[start] = length
        self._first_of[start + length - 1] = start
        if length not in self._starts:
            self._starts[length] = {}
            bisect.insort(self._lengths, length)
        self._starts[length][start] = None
        self._count += length

    def _remove(self, start: int) -> int:
        length = self._length_of.pop(start)
        del self._first_of[start + length - 1]
        del self._starts[length][start]
        if not self._starts[length]:
            del self._starts[length]
            self._lengths.remove(length)
        self._count -= length
        return length
