"""Which blocks a request holds: every change of a prefill pool's block spaces is made here. Pure.

The life of a request's blocks
1. ``place`` shares the cached prefix and finds a ring on which there is room for the rest;
2. ``grant`` takes a block for everything else, fetched or to be computed;
3. ``begin_transfer`` when a peer may read from some of them, or they from a peer;
   ``end_transfer`` when no such read can be in flight any more;
4. ``offer`` names what is full by its hash, for later prompts to find; until then it is *coming*,
   and others with the same prefix wait for it; ``disown`` takes all of that back;
5. ``give_back`` gives them all up, whatever ended the request.
"""

from collections.abc import Sequence
from functools import partial

from prefill.blocks import PoolBlocks, owned, placed
from prefill.facts import PoolFacts
from prefill.placement import ChunkCosts, RingPlacement, placements
from prefill.request import Request
from protocol.messages import BlockCounts
from protocol.plans import PlacedBlock


class RequestMemory:
    """A prefill pool's blocks, by request."""

    def __init__(self, facts: PoolFacts, costs: ChunkCosts) -> None:
        self._facts = facts
        self._costs = costs
        geometry = facts.geometry
        self._blocks = PoolBlocks(geometry.cp_size, facts.num_blocks, geometry.block_size)
        self._coming: set[bytes] = set()  # hashes of blocks that admitted requests will fill

    def place(self, request: Request, load_s: Sequence[float]) -> RingPlacement | None:
        """The best placement that there are blocks for; its cached prefix is shared from now on.

        Args:
            load_s: what each cp rank has to do before it gets to this prompt.
        """
        cached = self._blocks.match(self._hashes_to_hit(request))
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
            if self._blocks.share(prefix, option.demand):
                request.blocks = placed(0, prefix)
                return option
        return None

    def grant(self, request: Request, placement: RingPlacement) -> None:
        """Give it all blocks that are not cached."""
        new = self._blocks.allocate(placement.owners)
        request.blocks += placed(placement.num_cached_blocks, new)
        request.placement = placement
        self._coming.update(request.block_hashes[placement.num_cached_blocks :])

    def is_prefix_coming(self, request: Request) -> bool:
        """Whether an admitted request will soon have filled more of the same prefix."""
        hashes = self._hashes_to_hit(request)
        num_cached = len(self._blocks.match(hashes))
        return num_cached < len(hashes) and hashes[num_cached] in self._coming

    def begin_transfer(self, request: Request, blocks: Sequence[PlacedBlock]) -> None:
        moving = owned(blocks)
        self._blocks.begin_transfer(moving)
        request.in_transfer += moving

    def end_transfer(self, request: Request) -> None:
        """Nothing is read from or into its blocks any more."""
        self._blocks.end_transfer(request.in_transfer)
        request.in_transfer = []

    def offer(self, request: Request, blocks: Sequence[PlacedBlock]) -> None:
        """These are full and hold what they should."""
        for block in blocks:
            block_hash = request.block_hashes[block.logical]
            self._blocks.set_hash(block, block_hash)
            self._coming.discard(block_hash)

    def expect_no_more(self, request: Request) -> None:
        """What it has not filled yet, it will not fill."""
        self._coming.difference_update(request.block_hashes)

    def disown(self, block_hashes: Sequence[bytes]) -> None:
        """What lies under these is in doubt, whoever computed it: nobody is to find it."""
        self._blocks.forget(block_hashes)

    def give_back(self, request: Request) -> None:
        """The one place where blocks are given back."""
        self.end_transfer(request)
        self._blocks.release(owned(request.blocks))
        request.blocks, request.placement = (), None

    def take_cache_events(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Hashes (newly held, no longer held) by the pool since the last call."""
        return self._blocks.take_cache_events()

    def counts(self) -> tuple[BlockCounts, ...]:
        """The conservation audit's figures of each cp rank."""
        return self._blocks.counts()

    def check(self, num_held: int) -> None:
        """Assert that every block is accounted for, ``num_held`` being held by requests."""
        self._blocks.check()
        if num_held == 0:
            counts = self.counts()
            assert not self._coming
            assert all(c.owned == c.in_flight == 0 for c in counts), counts

    def _hashes_to_hit(self, request: Request) -> list[bytes]:
        """Of the blocks that it may find in the cache: its last token is always computed."""
        return request.block_hashes[: (request.num_tokens - 1) // self._facts.geometry.block_size]
