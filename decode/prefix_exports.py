"""Cached prefixes that prefill pools read back from here. Pure.

The life of a fetch
1. ``ask``: the prefill pool of a request with a ticket misses blocks of the prefix that was found
   here. They are marked as in transfer and handed to the transfer thread. Whatever else is asked
   for is refused, and the prefill pool computes it.
   A store may ask for what is cached here by its hashes, without any request.
2. ``close`` when the request has ended or the hand-off is broken: nothing more is announced.
3. ``end`` on ``SourceClosed``, when nobody reads from the blocks any more.

The sequence may let go of its blocks before that, or run on: until ``end`` they are not reused.
"""

from dataclasses import dataclass

from decode.sequence import Sequence
from decode.states import SequenceState
from kvcache.blocks import BlockPool
from kvtransfer.events import CloseSource, Command
from protocol.handoff import Fetch
from protocol.kv import BlockRef
from protocol.request import RequestKey

FETCH_TIMEOUT_S = 60.0


@dataclass(slots=True)
class _Fetch:
    blocks: tuple[BlockRef, ...]
    since: float = 0.0
    is_owner: bool = False  # of the blocks, for no request is
    is_closing: bool = False


class PrefixExports:
    """The fetches under way.

    Args:
        pool: the block space, of which only transfers are begun and ended here.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._fetches: dict[RequestKey, _Fetch] = {}
        self.num_blocks_total = 0

    def __len__(self) -> int:
        return len(self._fetches)

    def __contains__(self, key: RequestKey) -> bool:
        return key in self._fetches

    def ask(self, fetch: Fetch, sequence: Sequence | None, now: float) -> list[Command]:
        """Serve what is asked for, or refuse it; a request is served once.

        Args:
            sequence: the request's, if it is here.
        """
        if sequence is None and fetch.block_hashes:
            return self._ask_by_hash(fetch, now)
        key = fetch.key
        first, end = fetch.first_logical, fetch.first_logical + len(fetch.owners)
        if sequence is None or sequence.state is not SequenceState.RESERVED:
            return [fetch.refused("the request has no ticket here")]
        if sequence.is_served:
            return [fetch.refused("it was served before")]
        num_cached_blocks = sequence.num_cached_tokens // self._pool.block_size
        if not 0 <= first < end <= num_cached_blocks:
            reason = f"blocks {first} to {end} are not among the {num_cached_blocks} cached here"
            return [fetch.refused(reason)]
        sequence.is_served = True
        blocks = tuple(sequence.blocks[first:end])
        self._pool.begin_transfer(blocks)
        self._fetches[key] = _Fetch(blocks, now)
        self.num_blocks_total += len(blocks)
        return [fetch.served(blocks)]

    def _ask_by_hash(self, fetch: Fetch, now: float) -> list[Command]:
        key = fetch.key
        found = [self._pool.find(block_hash) for block_hash in fetch.block_hashes]
        blocks = tuple(ref for ref in found if ref is not None)
        if len(blocks) < len(fetch.owners) or key in self._fetches:
            return [fetch.refused("not all of it is cached here")]
        self._pool.share(blocks)
        self._pool.begin_transfer(blocks)
        self._fetches[key] = _Fetch(blocks, now, is_owner=True)
        self.num_blocks_total += len(blocks)
        return [fetch.served(blocks)]

    def tick(self, now: float) -> list[Command]:
        """Close what was asked for without a request and is ended by nobody."""
        late = [
            key
            for key, fetch in self._fetches.items()
            if fetch.is_owner and now - fetch.since > FETCH_TIMEOUT_S
        ]
        return [command for key in late for command in self.close(key)]

    def close(self, key: RequestKey) -> list[Command]:
        """End a fetch if there is one; ``SourceClosed`` will come. Idempotent."""
        fetch = self._fetches.get(key)
        if fetch is None or fetch.is_closing:
            return []
        fetch.is_closing = True
        return [CloseSource(*key)]

    def end(self, key: RequestKey) -> None:
        """Nobody reads from its blocks any more."""
        fetch = self._fetches.pop(key)
        self._pool.end_transfer(fetch.blocks)
        if fetch.is_owner:
            self._pool.release(fetch.blocks)
