"""The block spaces of a prefill pool, one for each cp rank, taken together. Pure.

Every block that a request has on any rank goes through here: a cached prefix is shared, the rest is
granted at once for the whole prompt, transfers are counted, and all is given back in one call.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from kvcache.blocks import BlockPool
from kvcache.prefix import match_prefix, take_cache_events
from protocol.kv import BlockRef
from protocol.messages import BlockCounts
from protocol.plans import PlacedBlock

Owned = tuple[int, BlockRef]  # of a cp rank's block space


class PoolBlocks:
    """The block spaces of ``cp_size`` ranks with ``num_blocks`` each."""

    def __init__(self, cp_size: int, num_blocks: int, block_size: int) -> None:
        self._spaces = [BlockPool(num_blocks, block_size) for _ in range(cp_size)]

    def match(self, block_hashes: Sequence[bytes]) -> list[Owned]:
        """The longest prefix that the ranks hold between them."""
        return match_prefix(self._spaces, block_hashes)

    def share(self, prefix: Sequence[Owned], demand: Mapping[int, int]) -> bool:
        """Add an owner to a cached prefix if ``demand`` blocks can be allocated beside it."""
        # Shared blocks are no longer evictable: only afterwards is it known what is left.
        for cp_rank, refs in _by_rank(prefix):
            self._spaces[cp_rank].share(refs)
        if all(self._spaces[rank].can_allocate(count) for rank, count in demand.items()):
            return True
        self.release(prefix)
        return False

    def allocate(self, owners: Sequence[int]) -> list[Owned]:
        """A block on each of these cp ranks, in this order; adjacent ids on each rank if possible.

        Raises:
            IllegalTransition: ``share`` has not said that there are enough.
        """
        granted = {
            rank: iter(self._spaces[rank].allocate(count))
            for rank, count in Counter(owners).items()
        }
        return [(rank, next(granted[rank])) for rank in owners]

    def set_hash(self, block: PlacedBlock, block_hash: bytes) -> None:
        """Say what a computed, full block holds."""
        self._spaces[block.cp_rank].set_hash(ref_of(block), block_hash)

    def forget(self, block_hashes: Sequence[bytes]) -> None:
        """What holds these is in doubt: no later prompt is to find it."""
        for space in self._spaces:
            space.forget(block_hashes)

    def begin_transfer(self, blocks: Sequence[Owned]) -> None:
        for cp_rank, refs in _by_rank(blocks):
            self._spaces[cp_rank].begin_transfer(refs)

    def end_transfer(self, blocks: Sequence[Owned]) -> None:
        for cp_rank, refs in _by_rank(blocks):
            self._spaces[cp_rank].end_transfer(refs)

    def release(self, blocks: Sequence[Owned]) -> None:
        """Drop one owner of each; blocks are given in logical order, the first is kept longest."""
        for cp_rank, refs in _by_rank(blocks):
            self._spaces[cp_rank].release(refs)

    def take_cache_events(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Hashes (newly held, no longer held) by the pool since the last call."""
        return take_cache_events(self._spaces)

    def counts(self) -> tuple[BlockCounts, ...]:
        """The conservation audit's figures of each cp rank."""
        return tuple(space.counts() for space in self._spaces)

    def check(self) -> None:
        """Recount everything and assert that all views of it agree."""
        for space in self._spaces:
            space.check()


def ref_of(block: PlacedBlock) -> BlockRef:
    return BlockRef(block.block_id, block.generation)


def owned(blocks: Iterable[PlacedBlock]) -> list[Owned]:
    return [(block.cp_rank, ref_of(block)) for block in blocks]


def placed(first_logical: int, blocks: Sequence[Owned]) -> tuple[PlacedBlock, ...]:
    """``blocks`` as those of a sequence from ``first_logical`` on."""
    return tuple(
        PlacedBlock(
            logical=first_logical + index,
            cp_rank=cp_rank,
            block_id=ref.block_id,
            generation=ref.generation,
        )
        for index, (cp_rank, ref) in enumerate(blocks)
    )


def _by_rank(blocks: Sequence[Owned]) -> list[tuple[int, list[BlockRef]]]:
    refs: dict[int, list[BlockRef]] = {}
    for cp_rank, ref in blocks:
        refs.setdefault(cp_rank, []).append(ref)
    return list(refs.items())
