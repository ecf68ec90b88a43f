"""Where a prompt is computed: how much of it is cached, on which ring, in which chunks. Pure.

1. A prefix of the prompt is found in the cache, its blocks lying on any ranks. The ring must hold
   all of them, so a shorter prefix may be the better one: each point at which a further owner comes
   in is a *cut*, and so is using nothing of the cache.
2. Of each cut and ring size the finish is predicted: when the chosen ranks have done what they have
   been given before, plus the chunks' time.
3. The chunks of the chosen one are dealt: every block of the prompt gets its owner.

The whole prompt is placed at once, so the blocks that it needs on each rank are known, and are
granted before its first chunk: a request that has begun never waits for a block.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from ring_attention.cost import ChunkShape, CostModel
from ring_attention.partition import deal_zigzag

# A last chunk of less than this share of a full one is joined to the chunk before it.
MIN_TAIL = 0.25


class ChunkCosts(Protocol):
    """What a chunk costs: ``new`` tokens that attend to ``cached`` ones and to themselves."""

    def seconds(self, new: int, cached: int, ring_size: int) -> float:
        """Predicted time of a chunk."""
        ...

    def prefers_pass_q(self, new: int, cached: int, ring_size: int) -> bool:
        """Whether queries rather than keys should go round the ring."""
        ...

    def worth_taking(self, new: int, cached: int, ring_sizes: Sequence[int]) -> Sequence[int]:
        """The ring sizes that do not waste the ranks they take; at least one."""
        ...


@dataclass(frozen=True, slots=True)
class PoolCosts:
    """The measured cost model with one pool's model and the operator's choice filled in.

    Args:
        ring_threshold_tokens: prompts of at least that many tokens to compute ring over all ranks,
            shorter ones never do; None leaves it to the cost model.
    """

    model: CostModel
    shape: ChunkShape
    ring_threshold_tokens: int | None = None

    def seconds(self, new: int, cached: int, ring_size: int) -> float:
        return self.model.chunk_seconds(self.shape, new, cached, ring_size)

    def prefers_pass_q(self, new: int, cached: int, ring_size: int) -> bool:
        return self.model.prefers_pass_q(self.shape, new, cached, ring_size)

    def worth_taking(self, new: int, cached: int, ring_sizes: Sequence[int]) -> Sequence[int]:
        if self.ring_threshold_tokens is not None:
            return (max(ring_sizes) if new >= self.ring_threshold_tokens else 1,)
        largest = self.model.choose_ring_size(self.shape, new, cached, ring_sizes)
        return [size for size in ring_sizes if size <= largest]


@dataclass(frozen=True, slots=True)
class Geometry:
    """What every placement in a pool goes by."""

    cp_size: int
    block_size: int
    chunk_tokens: int  # of each rank of a ring

    @property
    def ring_sizes(self) -> tuple[int, ...]:
        """1, 2, 4, ... and all ranks."""
        powers = [1 << i for i in range(self.cp_size.bit_length()) if 1 << i < self.cp_size]
        return (*powers, self.cp_size)

    def with_chunks_of(self, chunk_tokens: int) -> "Geometry":
        """The same with chunks that are no longer than that; 0 changes nothing."""
        if not 0 < chunk_tokens < self.chunk_tokens:
            return self
        return replace(self, chunk_tokens=chunk_tokens)

    def chunk_ends(self, start: int, end: int, ring_size: int) -> Iterator[int]:
        """Where the chunks of tokens ``[start, end)`` end; all but the last deal out evenly."""
        even = 2 * ring_size * self.block_size
        size = max(1, self.chunk_tokens * ring_size // even) * even
        while end - start > size * (1 + MIN_TAIL):
            start += size
            yield start
        yield end


@dataclass(frozen=True)
class RingPlacement:
    """One way to compute a prompt."""

    geometry: Geometry
    num_tokens: int
    num_cached_blocks: int
    ring: tuple[int, ...]
    finish_s: float  # from now on
    total_s: float
    num_fetched_blocks: int = 0  # after the cached ones, from the decode pool

    @property
    def num_prefix_blocks(self) -> int:
        """Blocks that need not be computed."""
        return self.num_cached_blocks + self.num_fetched_blocks

    @cached_property
    def chunks(self) -> tuple[range, ...]:
        """The tokens of each chunk."""
        start = self.num_prefix_blocks * self.geometry.block_size
        chunks = []
        for end in self.geometry.chunk_ends(start, self.num_tokens, len(self.ring)):
            chunks.append(range(start, end))
            start = end
        return tuple(chunks)

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """The cp rank of each block that is not cached, in logical order."""
        block_size = self.geometry.block_size
        owners: list[int] = []
        for num_blocks in (
            self.num_fetched_blocks,
            *(-(-len(chunk) // block_size) for chunk in self.chunks),
        ):
            dealt = [0] * num_blocks
            for cp_rank, blocks in zip(
                self.ring, deal_zigzag(num_blocks, len(self.ring)), strict=True
            ):
                for block in blocks:
                    dealt[block] = cp_rank
            owners += dealt
        return tuple(owners)

    @cached_property
    def demand(self) -> Counter[int]:
        """Blocks that are needed on each cp rank."""
        return Counter(self.owners)


def placements(
    geometry: Geometry,
    costs: ChunkCosts,
    *,
    num_tokens: int,
    cached_owners: Sequence[int],
    load_s: Sequence[float],
    num_fetched_blocks: int = 0,
) -> list[RingPlacement]:
    """Every way worth considering, the best first.

    Rings that the cost model finds worth taking come first; the others follow in case that only
    they have enough blocks.

    Args:
        num_tokens: of the prompt; at least one of them is not cached.
        cached_owners: the cp rank of each cached block, in logical order.
        load_s: what each cp rank has to do before it gets to this prompt.
        num_fetched_blocks: that come from elsewhere after all that is cached, to any ranks.
    """
    cuts = iter((len(cached_owners),)) if num_fetched_blocks else _cuts(cached_owners)
    ranked: list[tuple[bool, float, int, RingPlacement]] = []
    for cut in cuts:
        owners = frozenset(cached_owners[:cut])
        cached = (cut + num_fetched_blocks) * geometry.block_size
        sizes = [size for size in geometry.ring_sizes if size >= len(owners)]
        worth_taking = costs.worth_taking(num_tokens - cached, cached, geometry.ring_sizes)
        wanted = [size for size in worth_taking if size >= len(owners)] or sizes[:1]
        for size in sizes:
            others = sorted(set(range(geometry.cp_size)) - owners, key=lambda rank: load_s[rank])
            ring = tuple(sorted((*owners, *others[: size - len(owners)])))
            total_s = _total_s(geometry, costs, cached, num_tokens, size)
            finish_s = max(load_s[rank] for rank in ring) + total_s
            placement = RingPlacement(
                geometry, num_tokens, cut, ring, finish_s, total_s, num_fetched_blocks
            )
            ranked.append((size not in wanted, finish_s, size, placement))
    ranked.sort(key=lambda item: item[:3])
    return [placement for *_, placement in ranked]


def fits_ever(geometry: Geometry, num_tokens: int, num_blocks: int) -> bool:
    """Whether a prompt can be computed in an empty pool of ``num_blocks`` on each cp rank."""
    for size in geometry.ring_sizes:
        ring = tuple(range(size))
        demand = RingPlacement(geometry, num_tokens, 0, ring, 0.0, 0.0).demand
        if max(demand.values()) <= num_blocks:
            return True
    return False


def _cuts(cached_owners: Sequence[int]) -> Iterator[int]:
    """Lengths of cached prefix worth considering: each just before a new owner comes in, and all.

    From longest to shortest; the last is nothing.
    """
    cuts = [len(cached_owners)] if cached_owners else []
    seen: set[int] = set()
    for index, owner in enumerate(cached_owners):
        if owner not in seen:
            seen.add(owner)
            cuts.append(index)
    return iter(sorted({*cuts, 0}, reverse=True))


def _total_s(geometry: Geometry, costs: ChunkCosts, start: int, end: int, ring_size: int) -> float:
    total_s = 0.0
    for chunk_end in geometry.chunk_ends(start, end, ring_size):
        total_s += costs.seconds(chunk_end - start, start, ring_size)
        start = chunk_end
    return total_s
