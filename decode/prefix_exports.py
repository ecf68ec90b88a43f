"""Cached prefixes that prefill pools read back from here. Pure.

The life of a fetch
1. ``ask``: the prefill pool of a request with a ticket misses blocks of the prefix that was found
   here. They are marked as in transfer and served. Any other fetch is refused, and the prefill pool
   computes the blocks. A store may ask for cached blocks by their hashes, without any request.
2. ``close`` when the request has ended or the hand-off is broken: nothing more is announced.
3. ``on_closed`` on ``SourceClosed``, when no rank reads from the blocks any more.

The sequence may give up its blocks before that, or run on: until ``on_closed`` they are not reused.
"""

from dataclasses import dataclass

from decode.sequence import Sequence
from decode.states import SequenceState
from engine.leader_node import Commands
from kvcache.blocks import BlockPool
from kvtransfer.events import CloseSource
from protocol.handoff import Fetch
from protocol.kv import BlockRef
from protocol.request import RequestKey

FETCH_TIMEOUT_S = 60.0


@dataclass(slots=True)
class _Fetch:
    blocks: tuple[BlockRef, ...]
    since: float = 0.0
    is_owner: bool = False  # of the blocks, which no request owns
    is_closing: bool = False


class PrefixExports:
    """The fetches under way.

    Args:
        blocks: the block space, of which only transfers are begun and ended here.
        commands: takes what follows.
    """

    def __init__(self, blocks: BlockPool, commands: Commands) -> None:
        self._blocks = blocks
        self._commands = commands
        self._fetches: dict[RequestKey, _Fetch] = {}
        self.num_blocks_total = 0

    def __len__(self) -> int:
        return len(self._fetches)

    def __contains__(self, key: RequestKey) -> bool:
        return key in self._fetches

    def ask(self, fetch: Fetch, sequence: Sequence | None, now: float) -> None:
        """Serve what is asked for, or refuse it. A request is served once.

        Args:
            fetch: of the request's prefill pool, or of a store.
            sequence: the request's, if it is here.
            now: on the clock of ``tick``.
        """
        if sequence is None and fetch.block_hashes:
            self._ask_by_hash(fetch, now)
            return
        if sequence is None or sequence.state is not SequenceState.RESERVED:
            self._refuse(fetch, "the request has no ticket here")
            return
        if sequence.is_served:
            self._refuse(fetch, "it was served before")
            return
        first = fetch.first_logical
        end = first + len(fetch.owners)
        num_cached_blocks = sequence.num_cached_tokens // self._blocks.block_size
        if not 0 <= first < end <= num_cached_blocks:
            reason = f"blocks {first} to {end} are not among the {num_cached_blocks} cached here"
            self._refuse(fetch, reason)
            return
        sequence.is_served = True
        self._serve(fetch, tuple(sequence.blocks[first:end]), now)

    def _ask_by_hash(self, fetch: Fetch, now: float) -> None:
        found = [self._blocks.find(block_hash) for block_hash in fetch.block_hashes]
        blocks = tuple(ref for ref in found if ref is not None)
        if len(blocks) < len(fetch.owners) or fetch.key in self._fetches:
            self._refuse(fetch, "not all of it is cached here")
            return
        self._blocks.share(blocks)  # no request owns them, so this fetch does
        self._serve(fetch, blocks, now, is_owner=True)

    def _serve(
        self, fetch: Fetch, blocks: tuple[BlockRef, ...], now: float, *, is_owner: bool = False
    ) -> None:
        self._blocks.begin_transfer(blocks)
        self._fetches[fetch.key] = _Fetch(blocks, now, is_owner)
        self.num_blocks_total += len(blocks)
        self._commands.add(fetch.served(blocks))

    def _refuse(self, fetch: Fetch, reason: str) -> None:
        self._commands.add(fetch.refused(reason))

    def tick(self, now: float) -> None:
        """Close fetches that have no request, whose end would close them, and take too long."""
        late = [
            key
            for key, fetch in self._fetches.items()
            if fetch.is_owner and now - fetch.since > FETCH_TIMEOUT_S
        ]
        for key in late:
            self.close(key)

    def close(self, key: RequestKey) -> None:
        """End a fetch, if there is one; ``SourceClosed`` will follow. Idempotent."""
        fetch = self._fetches.get(key)
        if fetch is not None and not fetch.is_closing:
            fetch.is_closing = True
            self._commands.add(CloseSource(*key))

    def on_closed(self, key: RequestKey) -> None:
        """No rank reads from a fetch's blocks any more."""
        fetch = self._fetches.pop(key)
        self._blocks.end_transfer(fetch.blocks)
        if fetch.is_owner:
            self._blocks.release(fetch.blocks)
