"""Cached prefixes that prefill pools read back from here. Pure.

The life of a fetch
1. ``ask``: the prefill pool of a request with a ticket misses blocks of the prefix that was found
   here. They are marked as in transfer and handed to the transfer thread. Whatever else is asked
   for is refused, and the prefill pool computes it.
2. ``close`` when the request has ended or the hand-off is broken: nothing more is announced.
3. ``end`` on ``SourceClosed``, when nobody reads from the blocks any more.

The sequence may let go of its blocks before that, or run on: until ``end`` they are not reused.
"""

from dataclasses import dataclass

from decode.sequence import Key, Sequence
from decode.states import State
from kvcache.blocks import BlockPool
from kvtransfer.events import CloseSource, Command, FetchAsked, RefuseFetch, ServeBlocks
from protocol.kv import BlockRef


@dataclass(slots=True)
class _Fetch:
    blocks: tuple[BlockRef, ...]
    is_closing: bool = False


class Serving:
    """The fetches under way.

    Args:
        pool: the block space, of which only transfers are begun and ended here.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._fetches: dict[Key, _Fetch] = {}
        self.num_blocks_total = 0

    def __len__(self) -> int:
        return len(self._fetches)

    def __contains__(self, key: Key) -> bool:
        return key in self._fetches

    def ask(self, event: FetchAsked, sequence: Sequence | None) -> list[Command]:
        """Serve what is asked for, or refuse it; a request is served once.

        Args:
            sequence: the request's, if it is here.
        """
        key = (event.request_id, event.attempt)
        first, end = event.first_logical, event.first_logical + len(event.owners)
        to = (*key, event.target_pool_id, event.target_epoch)
        if sequence is None or sequence.state is not State.RESERVED:
            return [RefuseFetch(*to, "the request has no ticket here")]
        if sequence.is_served:
            return [RefuseFetch(*to, "it was served before")]
        num_cached_blocks = sequence.num_cached_tokens // self._pool.block_size
        if not 0 <= first < end <= num_cached_blocks:
            reason = f"blocks {first} to {end} are not among the {num_cached_blocks} cached here"
            return [RefuseFetch(*to, reason)]
        sequence.is_served = True
        blocks = tuple(sequence.blocks[first:end])
        self._pool.begin_transfer(blocks)
        self._fetches[key] = _Fetch(blocks)
        self.num_blocks_total += len(blocks)
        return [ServeBlocks(*to, first, blocks, event.owners)]

    def close(self, key: Key) -> list[Command]:
        """End a fetch if there is one; ``SourceClosed`` will come. Idempotent."""
        fetch = self._fetches.get(key)
        if fetch is None or fetch.is_closing:
            return []
        fetch.is_closing = True
        return [CloseSource(*key)]

    def end(self, key: Key) -> None:
        """Nobody reads from its blocks any more."""
        self._pool.end_transfer(self._fetches.pop(key).blocks)
