"""The blocks of each request: every change of a prefill pool's block spaces is made here. Pure.

Each cp rank of the pool has a block space of its own. A block is named by the rank and a reference
into its space.

The life of a request's blocks
1. ``place`` shares the cached prefix and finds a ring on which there is room for the rest;
2. ``grant`` takes a block for everything else, fetched or to be computed;
3. ``begin_transfer`` when a peer may read from some of them, or this pool reads into some;
   ``end_transfer`` when no such read can be in flight any more;
4. ``offer`` names full blocks by their hashes, for later prompts to find. Until then they are
   *coming*, and others with the same prefix wait for them. ``disown`` takes all of that back;
5. ``give_back`` gives them all up, however the request has ended.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial

from kvcache.blocks import BlockPool
from kvcache.prefix import match_prefix, take_cache_events
from prefill.facts import PrefillFacts
from prefill.placement import ChunkCosts, RingPlacement, placements
from prefill.request import Owned, Request, placed, ref_of
from protocol.kv import BlockRef
from protocol.messages import BlockCounts
from protocol.plans import PlacedBlock


class RequestMemory:
    """A prefill pool's blocks, by request.

    Args:
        facts: of the pool.
        spaces: its block spaces, one for each cp rank.
        costs: of chunks, by which placements are ranked.
    """

    def __init__(self, facts: PrefillFacts, spaces: Sequence[BlockPool], costs: ChunkCosts) -> None:
        self._facts = facts
        self._spaces = spaces
        self._costs = costs
        self._coming: set[bytes] = set()  # hashes of blocks that admitted requests will fill

    # -- a request's way ---------------------------------------------------------------------------

    def place(self, request: Request, load_s: Sequence[float]) -> RingPlacement | None:
        """Choose where a request is computed, and share its cached prefix from now on.

        Args:
            request: that waits.
            load_s: seconds of work that each cp rank has before this prompt.

        Returns:
            The best placement for which there are blocks, or None: then nothing is shared.
        """
        cached = match_prefix(self._spaces, self._hashes_to_hit(request))
        options_for = partial(
            placements,
            self._facts.geometry.with_chunks_of(request.message.chunk_tokens),
            self._costs,
            num_tokens=request.num_tokens,
            cached_owners=[cp_rank for cp_rank, _ in cached],
            load_s=load_s,
        )
        options = options_for()
        if request.may_fetch:
            num_missed = self._facts.num_blocks_to_fetch(request.message, len(cached))
            if num_missed:
                options = options_for(num_fetched_blocks=num_missed) + options
        if request.message.ring_size:  # stable: the best of each kind stays in front
            options.sort(key=lambda option: len(option.ring) != request.message.ring_size)
        for option in options:
            prefix = cached[: option.num_cached_blocks]
            if self._share(prefix, option.demand):
                request.blocks = placed(0, prefix)
                return option
        return None

    def _share(self, prefix: Sequence[Owned], demand: Counter[int]) -> bool:
        """Add an owner to a cached prefix, if ``demand`` blocks can be allocated beside it."""
        # A shared block can no longer be evicted, so what is left is known only after sharing.
        for cp_rank, refs in _by_rank(prefix):
            self._spaces[cp_rank].share(refs)
        if all(self._spaces[rank].can_allocate(count) for rank, count in demand.items()):
            return True
        self._release(prefix)
        return False

    def grant(self, request: Request, placement: RingPlacement) -> None:
        """Give a request that is placed all the blocks that are not cached, adjacent if possible.

        Raises:
            IllegalTransition: ``place`` has not found room for it.
        """
        counts = Counter(placement.owners)
        granted = {rank: iter(self._spaces[rank].allocate(count)) for rank, count in counts.items()}
        new = [(rank, next(granted[rank])) for rank in placement.owners]
        request.blocks += placed(placement.num_cached_blocks, new)
        request.placement = placement
        self._coming.update(request.block_hashes[placement.num_cached_blocks :])

    def is_prefix_coming(self, request: Request) -> bool:
        """Whether an admitted request will soon have filled more of the same prefix."""
        hashes = self._hashes_to_hit(request)
        num_cached = len(match_prefix(self._spaces, hashes))
        return num_cached < len(hashes) and hashes[num_cached] in self._coming

    def begin_transfer(self, request: Request, blocks: Sequence[PlacedBlock]) -> None:
        """From now on a peer may read from these blocks, or bytes of a peer may land in them."""
        moving = _owned(blocks)
        for cp_rank, refs in _by_rank(moving):
            self._spaces[cp_rank].begin_transfer(refs)
        request.in_transfer += moving

    def end_transfer(self, request: Request) -> None:
        """No read from or into the request's blocks is in flight any more."""
        for cp_rank, refs in _by_rank(request.in_transfer):
            self._spaces[cp_rank].end_transfer(refs)
        request.in_transfer = []

    def offer(self, request: Request, blocks: Sequence[PlacedBlock]) -> None:
        """Let later prompts find these blocks, which are full and right."""
        for block in blocks:
            block_hash = request.block_hashes[block.logical]
            self._spaces[block.cp_rank].set_hash(ref_of(block), block_hash)
            self._coming.discard(block_hash)

    def expect_no_more(self, request: Request) -> None:
        """The request will fill no more blocks: let others with its prefix not wait for them."""
        self._coming.difference_update(request.block_hashes)

    def disown(self, block_hashes: Sequence[bytes]) -> None:
        """Keep later prompts from finding the blocks with these hashes, whose KV is in doubt."""
        for space in self._spaces:
            space.forget(block_hashes)

    def give_back(self, request: Request) -> None:
        """Give up all blocks of a request. This is the one place where blocks are given back."""
        self.end_transfer(request)
        self._release(_owned(request.blocks))
        request.blocks = ()
        request.placement = None

    # -- the pool ----------------------------------------------------------------------------------

    def take_cache_events(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Hashes (newly held, no longer held) by the pool since the last call."""
        return take_cache_events(self._spaces)

    def counts(self) -> tuple[BlockCounts, ...]:
        """The conservation audit's figures of each cp rank."""
        return tuple(space.counts() for space in self._spaces)

    def check(self, num_held: int) -> None:
        """Recount everything, and assert that nothing is held when requests hold no block.

        Args:
            num_held: blocks that requests hold.
        """
        for space in self._spaces:
            space.check()
        if num_held == 0:
            counts = self.counts()
            assert not self._coming
            assert all(c.owned == c.in_flight == 0 for c in counts), counts

    def _release(self, blocks: Sequence[Owned]) -> None:
        """Drop one owner of each; blocks are given in logical order, the first is kept longest."""
        for cp_rank, refs in _by_rank(blocks):
            self._spaces[cp_rank].release(refs)

    def _hashes_to_hit(self, request: Request) -> list[bytes]:
        """Of the blocks that it may find in the cache: its last token is always computed."""
        return request.block_hashes[: (request.num_tokens - 1) // self._facts.geometry.block_size]


def _owned(blocks: Iterable[PlacedBlock]) -> list[Owned]:
    return [(block.cp_rank, ref_of(block)) for block in blocks]


def _by_rank(blocks: Sequence[Owned]) -> list[tuple[int, list[BlockRef]]]:
    refs: dict[int, list[BlockRef]] = {}
    for cp_rank, ref in blocks:
        refs.setdefault(cp_rank, []).append(ref)
    return list(refs.items())
