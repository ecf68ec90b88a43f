"""The blocks of each sequence: every change of a decode pool's block space is made here. Pure.

The life of a sequence's blocks
1. ``allocate`` shares the longest cached prefix and takes new blocks for the rest;
2. ``begin_transfer`` while a hand-off may write into them, ``end_transfer`` when none can any more;
3. ``grow`` adds one when the context crosses a block boundary;
4. ``offer`` names the full blocks by their hashes, for later prompts to find; ``forget`` takes that
   back, and nothing of a doubtful sequence is offered;
5. ``release`` gives them all up, in one place, however the sequence has ended. Blocks into which a
   peer may still write are given up by ``close_transfer``, when none can any more. Blocks that have
   arrived in full by then stay in the cache, and the next attempt goes on from there.
"""

from collections.abc import Iterable

from decode.sequence import Sequence
from kvcache.blocks import BlockPool
from kvcache.prefix import hash_blocks
from protocol.kv import BlockRef
from protocol.messages import BlockCounts, CacheUpdate


class SequenceMemory:
    """A decode pool's blocks, by sequence.

    Args:
        pool: the block space, which only this object and the exports of prefixes change.
        watermark_blocks: kept available for running sequences when one is admitted.
    """

    def __init__(self, pool: BlockPool, watermark_blocks: int) -> None:
        self._pool = pool
        self._watermark_blocks = watermark_blocks
        self.block_size = pool.block_size
        self.num_slots = pool.num_blocks * pool.block_size
        self.has_new_room = True  # a block has become free since admission last found no room

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, sequence: Sequence, num_slots: int, *, is_alone: bool) -> bool:
        """Give ``sequence`` blocks for ``num_slots`` tokens.

        Unless its KV waits in host memory, leading blocks that are cached are shared. At least one
        token is left to compute, because there would be nothing to sample from.

        Args:
            sequence: holds no block.
            num_slots: tokens that must find room.
            is_alone: no other sequence holds a block, so none needs room to grow.

        Returns:
            Whether there was room; if not, nothing is changed.
        """
        assert not sequence.blocks, "a sequence's blocks are allocated once"
        pool = self._pool
        cached = [] if sequence.num_swapped_blocks else pool.match(self._reusable(sequence))
        num_new = self.num_blocks_for(num_slots) - len(cached)
        # Share first: a shared block cannot be evicted to make room for the new ones.
        pool.share(cached)
        if not pool.can_allocate(num_new + (0 if is_alone else self._watermark_blocks)):
            pool.release(cached)
            return False
        sequence.blocks = cached + pool.allocate(num_new, cached[-1] if cached else None)
        sequence.num_hashed_blocks = len(cached)
        if not sequence.num_swapped_blocks:
            sequence.num_computed_tokens = len(cached) * self.block_size
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Make sure that the next token to compute has a slot; False when there is no block."""
        if sequence.num_tokens <= len(sequence.blocks) * self.block_size:
            return True
        if not self._pool.can_allocate(1):
            return False
        sequence.blocks += self._pool.allocate(1, sequence.blocks[-1])
        sequence.num_new_blocks += 1
        return True

    def begin_transfer(self, sequence: Sequence) -> int:
        """Mark the prompt's blocks that are not cached as written by a peer.

        Returns:
            The logical index of the first.
        """
        first = sequence.num_cached_tokens // self.block_size
        end = self.num_blocks_for(sequence.num_prompt_tokens)
        sequence.in_transfer = sequence.blocks[first:end]
        self._pool.begin_transfer(sequence.in_transfer)
        return first

    def num_blocks_to_load(self, sequence: Sequence) -> int:
        """Blocks of its prefix that a store has and this pool has not."""
        if sequence.store is None:
            return 0
        # The last token is always computed, because its logits are sampled.
        num_tokens = min(sequence.store.num_tokens, sequence.num_prompt_tokens - 1)
        return max(0, (num_tokens - sequence.num_cached_tokens) // self.block_size)

    def begin_loading(self, sequence: Sequence) -> tuple[int, list[BlockRef]]:
        """Mark the blocks that a store will write into.

        Returns:
            (the logical index of the first, the blocks).
        """
        first = sequence.num_cached_tokens // self.block_size
        end = first + self.num_blocks_to_load(sequence)
        sequence.in_transfer = sequence.blocks[first:end]
        self._pool.begin_transfer(sequence.in_transfer)
        return first, sequence.in_transfer

    def end_loading(self, sequence: Sequence, num_whole_blocks: int) -> None:
        """No byte of the store lands any more: let others find the leading, whole blocks."""
        self.end_transfer(sequence)
        sequence.num_loaded_tokens = num_whole_blocks * self.block_size
        sequence.num_cached_tokens += sequence.num_loaded_tokens
        sequence.num_computed_tokens = sequence.num_cached_tokens
        self.offer_prompt(sequence)

    def end_transfer(self, sequence: Sequence) -> None:
        """No byte lands in the sequence's blocks any more."""
        self._pool.end_transfer(sequence.in_transfer)
        sequence.in_transfer = []
        self.has_new_room = True

    def release_quiet(self, sequence: Sequence) -> None:
        """Give up the blocks that no peer writes into; ``close_transfer`` gives up the rest."""
        writing = set(sequence.in_transfer)
        self._pool.release([block for block in sequence.blocks if block not in writing])
        sequence.blocks = []
        sequence.num_new_blocks = 0
        self.has_new_room = True

    def close_transfer(self, sequence: Sequence, num_whole_blocks: int) -> None:
        """Give up the blocks that ``release_quiet`` has left: no byte lands in them any more.

        Args:
            sequence: whose hand-off has ended.
            num_whole_blocks: how many of them, from the first on, have arrived in full.
        """
        first = sequence.num_cached_tokens // self.block_size
        if sequence.is_doubtful:
            num_whole_blocks = 0
        hashes = sequence.block_hashes[first : first + num_whole_blocks]
        for block, block_hash in zip(sequence.in_transfer, hashes, strict=False):
            self._pool.set_hash(block, block_hash)
        self._pool.release(sequence.in_transfer)
        self.end_transfer(sequence)

    def forget(self, block_hashes: Iterable[bytes]) -> None:
        """Keep others from finding the blocks with these hashes, whose KV is in doubt."""
        self._pool.forget(block_hashes)

    def offer_prompt(self, sequence: Sequence) -> None:
        """Let others find the full blocks of the prompt whose KV is computed."""
        self._offer(sequence, min(sequence.num_computed_tokens, sequence.num_prompt_tokens))

    def release(self, sequence: Sequence) -> None:
        """Give up every block; the full ones, of prompt and output, stay to be found."""
        if sequence.num_computed_tokens // self.block_size > len(sequence.block_hashes):
            tokens = sequence.tokens(0, sequence.num_computed_tokens)
            sequence.block_hashes = hash_blocks(tokens, self.block_size, sequence.salt)
        self._offer(sequence, sequence.num_computed_tokens)
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_new_blocks = 0
        self.has_new_room = True

    def take_cache_update(self) -> CacheUpdate | None:
        """The hashes that are new, or gone, since the last call; None if there are none."""
        stored, evicted = self._pool.take_cache_events()
        return CacheUpdate(stored=stored, evicted=evicted) if stored or evicted else None

    def counts(self) -> BlockCounts:
        return self._pool.counts()

    def check(self) -> None:
        """Recount everything and assert that all views of it agree."""
        self._pool.check()

    def _reusable(self, sequence: Sequence) -> list[bytes]:
        if not sequence.block_hashes:
            tokens = sequence.tokens(0, sequence.num_tokens)
            sequence.block_hashes = hash_blocks(tokens, self.block_size, sequence.salt)
        return sequence.block_hashes[: (sequence.num_tokens - 1) // self.block_size]

    def _offer(self, sequence: Sequence, num_tokens: int) -> None:
        """Let others find the full blocks of the first ``num_tokens`` tokens.

        Of equal blocks the pool keeps the one that it knew first.
        """
        if sequence.is_doubtful:
            return
        end = num_tokens // self.block_size
        for index in range(sequence.num_hashed_blocks, end):
            self._pool.set_hash(sequence.blocks[index], sequence.block_hashes[index])
        sequence.num_hashed_blocks = max(end, sequence.num_hashed_blocks)
