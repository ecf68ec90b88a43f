"""How one chunk lies on a ring: the tokens, the keys, and the keys that tokens see, rank by rank.

1. The prefill leader deals a chunk's blocks with :func:`deal_zigzag`: each block has one owner, and
   causal work is even, because a rank gets one early and one late run of blocks.
2. Every rank of the ring derives the same :class:`Partition` from the same ChunkWork, so no size or
   position is ever sent: they are known on both sides of every message.
3. A rank's tokens of the chunk are a few runs of consecutive positions. All keys inside a run are
   the rank's own, so of another rank's keys a run sees just those before it: a leading slice of
   keys in ascending order, without a mask. Of its own it sees such a slice and its diagonal square.

No torch here: shapes and indices only.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from protocol.plans import ChunkWork, PlacedBlock

# A run's diagonal square costs (run length)^2 / 2 whatever the window is, so under a window runs
# are cut down to about the window; but not below what still makes an efficient kernel call.
MIN_CUT_RUN = 128


def deal_zigzag(num_blocks: int, ring_size: int) -> tuple[tuple[int, ...], ...]:
    """Deal blocks ``0 .. num_blocks - 1`` over a ring in zigzag order (PyTorch: head-tail).

    The blocks are cut into ``2 * ring_size`` consecutive runs that differ by at most one block;
    rank ``r`` takes runs ``r`` and ``2 * ring_size - 1 - r``. Spare blocks go first to the early
    run of each rank, then to the late run from rank 0 on, whose early run is the cheapest: no rank
    has more than one block row of causal work above the mean.

    Returns:
        Of each rank, its blocks in ascending order; empty for some ranks if blocks are few.
    """
    assert num_blocks >= 0 and ring_size >= 1
    num_runs = 2 * ring_size
    base, num_spare = divmod(num_blocks, num_runs)
    sizes = [base] * num_runs
    for spare in range(num_spare):
        sizes[spare if spare < ring_size else num_runs - 1 - (spare - ring_size)] += 1
    starts = list(accumulate(sizes, initial=0))
    runs = [range(start, end) for start, end in pairwise(starts)]
    return tuple((*runs[rank], *runs[num_runs - 1 - rank]) for rank in range(ring_size))


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Consecutive tokens of the chunk, all of one rank."""

    start: int  # position of the first
    num_tokens: int
    offset: int  # of the first, among the rank's tokens of the chunk

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def rows(self) -> slice:
        return slice(self.offset, self.offset + self.num_tokens)


@dataclass(frozen=True, slots=True)
class VisibleKeys:
    """The keys that one run sees of one shard: those with index ``[first_key, end_key)``."""

    run: TokenRun
    first_key: int
    end_key: int
    causal: bool
    window: int | None  # None also where it would cut nothing


@dataclass(frozen=True)
class Shard:
    """One rank's part of a chunk: the keys that it holds and the tokens that it computes."""

    cp_rank: int
    block_ids: tuple[int, ...]  # in logical order; the cached ones come first
    key_spans: tuple[tuple[int, int], ...]  # positions [start, end) of its keys, ascending
    runs: tuple[TokenRun, ...]

    @cached_property
    def _keys_before_span(self) -> tuple[int, ...]:
        return tuple(accumulate((end - start for start, end in self.key_spans), initial=0))

    @property
    def num_keys(self) -> int:
        return self._keys_before_span[-1]

    @property
    def num_tokens(self) -> int:
        return sum(run.num_tokens for run in self.runs)

    def num_keys_before(self, position: int) -> int:
        """Index of the first key at or after ``position``."""
        index = bisect_right(self.key_spans, position, key=lambda span: span[0]) - 1
        if index < 0:
            return 0
        start, end = self.key_spans[index]
        return self._keys_before_span[index] + min(position, end) - start


class Partition:
    """A chunk on its ring, as layers with one attention window see it.

    Indices are into the ring, not cp ranks. Cached blocks that no token of the chunk can see
    through the window are left out of the shards: they are neither gathered nor sent.
    """

    def __init__(self, work: ChunkWork, block_size: int, window: int | None = None) -> None:
        assert work.start % block_size == 0 and work.token_ids
        assert len(set(work.ring)) == len(work.ring)
        assert [block.logical for block in work.blocks] == list(range(len(work.blocks)))
        self.ring = work.ring
        self.window = window
        self.start = work.start
        self.end = work.start + len(work.token_ids)
        assert len(work.blocks) == -(-self.end // block_size)
        oldest = 0 if window is None else max(0, work.start - window + 1)
        self.shards = tuple(
            self._shard(cp_rank, work.blocks[oldest // block_size :], block_size)
            for cp_rank in work.ring
        )
        held = sum(len(shard.block_ids) for shard in self.shards)
        assert held == len(work.blocks) - oldest // block_size, "a block's owner is not in the ring"
        self._sights: dict[tuple[int, int], tuple[VisibleKeys, ...]] = {}

    def _shard(self, cp_rank: int, blocks: Sequence[PlacedBlock], block_size: int) -> Shard:
        own = [block for block in blocks if block.cp_rank == cp_rank]
        starts = [block.logical * block_size for block in own]
        spans = _join((start, min(start + block_size, self.end)) for start in starts)
        new = _join((max(start, self.start), end) for start, end in spans if end > self.start)
        limit = None if self.window is None else max(self.window, MIN_CUT_RUN)
        return Shard(
            cp_rank=cp_rank,
            block_ids=tuple(block.block_id for block in own),
            key_spans=spans,
            runs=tuple(_cut_runs(new, limit)),
        )

    @property
    def size(self) -> int:
        return len(self.ring)

    def visible_keys(self, q_index: int, k_index: int) -> tuple[VisibleKeys, ...]:
        """The keys at ring index ``k_index`` that the runs at ``q_index`` see; no entry is empty.

        Of a rank's own keys each run's diagonal comes first, so that no row is without keys when
        later partials are merged.
        """
        key = (q_index, k_index)
        if key not in self._sights:
            self._sights[key] = tuple(self._find_sights(*key))
        return self._sights[key]

    def _find_sights(self, q_index: int, k_index: int) -> Iterator[VisibleKeys]:
        shard = self.shards[k_index]
        for run in self.shards[q_index].runs:
            before = shard.num_keys_before(run.start)
            if q_index == k_index:
                cut = None if self.window is None or run.num_tokens <= self.window else self.window
                yield VisibleKeys(run, before, before + run.num_tokens, True, cut)
            oldest = 0
            cut = None
            if self.window is not None:
                oldest = shard.num_keys_before(run.start - self.window + 1)
                # Keys that the last query no longer sees: is there one among the slice's?
                if shard.num_keys_before(run.end - self.window) > oldest:
                    cut = self.window
            if oldest < before:
                yield VisibleKeys(run, oldest, before, False, cut)

    def kv_hops(self, index: int) -> int:
        """How many ranks on a rank's keys must travel until all that see any of them had them."""
        others = ((hop, (index + hop) % self.size) for hop in range(1, self.size))
        return max((hop for hop, other in others if self.visible_keys(other, index)), default=0)

    def q_hops(self, index: int) -> int:
        """How many ranks on a rank's queries must travel until they met all keys that they see."""
        others = ((hop, (index + hop) % self.size) for hop in range(1, self.size))
        return max((hop for hop, other in others if self.visible_keys(index, other)), default=0)


def _join(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Join spans that touch; they come in ascending order and do not overlap."""
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)


def _cut_runs(spans: Iterable[tuple[int, int]], limit: int | None) -> Iterator[TokenRun]:
    offset = 0
    for start, end in spans:
        step = end - start if limit is None else limit
        for first in range(start, end, step):
            run = TokenRun(first, min(step, end - first), offset)
            offset += run.num_tokens
            yield run
