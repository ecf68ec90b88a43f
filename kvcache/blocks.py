"""The blocks of one block space and their owners. Pure: ids and counters, no memory.

The life of a block
1. FREE -> OWNED: ``allocate`` hands it out at a new generation, runs of adjacent ids first;
2. OWNED -> IN_FLIGHT while transfers read or write it, and back when the last is seen to end;
3. a full block whose content is known gets a hash (``set_hash``); from then on ``match`` finds it
   and ``share`` gives it further owners;
4. the last owner releases it: with transfers still in flight it is DRAINING and not yet reusable;
   with a hash it is CACHED, and evicted, least recently used first, when free blocks run short;
   else FREE.

So a block has two lifetimes, its owners' and its transfers', and it can be handed out again only
when both are over: bytes of an aborted read can land until its handle is seen to end.
"""

import enum
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvcache.free_runs import FreeRuns
from protocol.errors import IllegalTransition, StaleError
from protocol.kv import BlockRef
from protocol.messages import BlockCounts


class BlockState(enum.StrEnum):
    """The state of a block, which follows from its counters; see ``_Block.state``."""

    FREE = "free"
    OWNED = "owned"
    IN_FLIGHT = "in_flight"  # owned, with transfers
    DRAINING = "draining"  # transfers alone; counted as in flight
    CACHED = "cached"


class BlockEvent(enum.StrEnum):
    """What can happen to a block."""

    ALLOCATE = "allocate"
    SHARE = "share"
    RELEASE = "release"
    BEGIN_TRANSFER = "begin_transfer"
    END_TRANSFER = "end_transfer"
    SET_HASH = "set_hash"
    FORGET = "forget"
    EVICT = "evict"


_S, _E = BlockState, BlockEvent

# (state, event) -> the states that may follow; the counters decide which of them does.
TABLE: dict[tuple[BlockState, BlockEvent], frozenset[BlockState]] = {
    (_S.FREE, _E.ALLOCATE): frozenset({_S.OWNED}),
    (_S.OWNED, _E.SHARE): frozenset({_S.OWNED}),
    (_S.OWNED, _E.RELEASE): frozenset({_S.OWNED, _S.CACHED, _S.FREE}),
    (_S.OWNED, _E.BEGIN_TRANSFER): frozenset({_S.IN_FLIGHT}),
    (_S.OWNED, _E.SET_HASH): frozenset({_S.OWNED}),
    (_S.OWNED, _E.FORGET): frozenset({_S.OWNED}),
    (_S.IN_FLIGHT, _E.SHARE): frozenset({_S.IN_FLIGHT}),
    (_S.IN_FLIGHT, _E.RELEASE): frozenset({_S.IN_FLIGHT, _S.DRAINING}),
    (_S.IN_FLIGHT, _E.BEGIN_TRANSFER): frozenset({_S.IN_FLIGHT}),
    (_S.IN_FLIGHT, _E.END_TRANSFER): frozenset({_S.IN_FLIGHT, _S.OWNED}),
    (_S.IN_FLIGHT, _E.SET_HASH): frozenset({_S.IN_FLIGHT}),
    (_S.IN_FLIGHT, _E.FORGET): frozenset({_S.IN_FLIGHT}),
    (_S.DRAINING, _E.SHARE): frozenset({_S.IN_FLIGHT}),
    (_S.DRAINING, _E.END_TRANSFER): frozenset({_S.DRAINING, _S.CACHED, _S.FREE}),
    (_S.DRAINING, _E.FORGET): frozenset({_S.DRAINING}),
    (_S.CACHED, _E.SHARE): frozenset({_S.OWNED}),
    (_S.CACHED, _E.EVICT): frozenset({_S.FREE}),
}


class _Block(NamedTuple):
    generation: int = 0
    num_owners: int = 0
    num_transfers: int = 0
    block_hash: bytes | None = None

    @property
    def state(self) -> BlockState:
        if self.num_transfers:
            return BlockState.IN_FLIGHT if self.num_owners else BlockState.DRAINING
        if self.num_owners:
            return BlockState.OWNED
        return BlockState.FREE if self.block_hash is None else BlockState.CACHED


def _advance(block: _Block, event: BlockEvent, block_hash: bytes | None = None) -> _Block:
    """The block after ``event``.

    Raises:
        IllegalTransition: the table does not have it, or a counter would fall below zero.
    """
    generation, num_owners, num_transfers, content = block
    match event:
        case BlockEvent.ALLOCATE:
            generation += 1
            num_owners = 1
        case BlockEvent.SHARE:
            num_owners += 1
        case BlockEvent.RELEASE:
            num_owners -= 1
        case BlockEvent.BEGIN_TRANSFER:
            num_transfers += 1
        case BlockEvent.END_TRANSFER:
            num_transfers -= 1
        case BlockEvent.SET_HASH | BlockEvent.EVICT | BlockEvent.FORGET:
            content = block_hash
    after = _Block(generation, num_owners, num_transfers, content)
    nothing_to_share = event is BlockEvent.SHARE and not block.num_owners and content is None
    if (
        after.state not in TABLE.get((block.state, event), ())
        or num_owners < 0
        or num_transfers < 0
        or nothing_to_share
    ):
        raise IllegalTransition(f"{event.value} of a block that is {block}")
    return after


class BlockPool:
    """The blocks of one block space, all FREE at first.

    Every method that takes refs does all of them or, when it raises, none.

    Args:
        num_blocks: ids are ``range(num_blocks)``.
        block_size: tokens per block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blocks = [_Block()] * num_blocks
        self._free = FreeRuns(num_blocks)
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._by_hash: dict[bytes, int] = {}
        self._counts: Counter[BlockState] = Counter({BlockState.FREE: num_blocks})
        self._cache_events: dict[bytes, bool] = {}  # hash -> stored, or else evicted

    # -- owners ------------------------------------------------------------------------------------

    def can_allocate(self, count: int) -> bool:
        """Whether that many blocks are free, or cached and evictable."""
        return count <= self.num_available

    @property
    def num_available(self) -> int:
        """Blocks that ``allocate`` could hand out now."""
        return len(self._free) + len(self._cached)

    def allocate(self, count: int, after: BlockRef | None = None) -> list[BlockRef]:
        """Hand out blocks at a new generation, with one owner each.

        Prefers adjacent ids; evicts cached blocks, least recently used first, only when too few
        are free.

        Args:
            count: how many.
            after: a block that these continue; its neighbour is taken when it is free.

        Raises:
            IllegalTransition: ``can_allocate(count)`` is False.
        """
        if not self.can_allocate(count):
            raise IllegalTransition(f"allocate {count} blocks, {self.num_available} available")
        while len(self._free) < count:
            oldest = next(iter(self._cached))
            self._set(oldest, _advance(self._blocks[oldest], BlockEvent.EVICT))
        block_ids = self._free.take(count, None if after is None else after.block_id)
        refs = []
        for block_id in block_ids:
            block = _advance(self._blocks[block_id], BlockEvent.ALLOCATE)
            self._set(block_id, block)
            refs.append(BlockRef(block_id, block.generation))
        return refs

    def share(self, refs: Iterable[BlockRef]) -> None:
        """Add an owner to blocks that ``match`` found, or that another owner has.

        Raises:
            StaleError: a ref is of an earlier generation.
            IllegalTransition: a block has no owner and no known content.
        """
        self._apply(BlockEvent.SHARE, refs)

    def release(self, refs: Iterable[BlockRef]) -> None:
        """Drop one owner of each.

        Of blocks that become cached, the last of ``refs`` is evicted first: a block is of no use
        without those before it.

        Raises:
            StaleError, IllegalTransition: a block is not owned at that generation.
        """
        self._apply(BlockEvent.RELEASE, list(refs)[::-1])

    # -- transfers ---------------------------------------------------------------------------------

    def begin_transfer(self, refs: Iterable[BlockRef]) -> None:
        """Count one more transfer from or into each.

        Raises:
            StaleError, IllegalTransition: a block is not owned at that generation.
        """
        self._apply(BlockEvent.BEGIN_TRANSFER, refs)

    def end_transfer(self, refs: Iterable[BlockRef]) -> None:
        """Count one transfer less: it was seen to end, whether it succeeded or not.

        Raises:
            StaleError, IllegalTransition: a block has no transfer in flight at that generation.
        """
        self._apply(BlockEvent.END_TRANSFER, refs)

    # -- content -----------------------------------------------------------------------------------

    def set_hash(self, ref: BlockRef, block_hash: bytes) -> bool:
        """Name the content of a full, owned block, so that ``match`` finds it.

        When another block is known to hold the same, that one stays in the index and nothing
        changes.

        Returns:
            Whether ``match`` now finds this very block.

        Raises:
            StaleError, IllegalTransition: the block is not owned at that generation.
        """
        block = self._checked(ref)
        after = _advance(block, BlockEvent.SET_HASH, block_hash)
        known = self._by_hash.setdefault(block_hash, ref.block_id)
        if known == ref.block_id:
            self._set(ref.block_id, after)
        return known == ref.block_id

    def forget(self, hashes: Iterable[bytes]) -> None:
        """Drop the blocks with these contents, which are in doubt, from what ``match`` finds.

        Owners of such a block keep it.
        """
        for block_hash in hashes:
            block_id = self._by_hash.get(block_hash)
            if block_id is not None:
                block = self._blocks[block_id]
                event = BlockEvent.EVICT if block.state is BlockState.CACHED else BlockEvent.FORGET
                self._set(block_id, _advance(block, event))

    def match(self, hashes: Sequence[bytes]) -> list[BlockRef]:
        """The blocks of the longest prefix of ``hashes`` that is here; ``share`` keeps them."""
        refs = []
        for block_hash in hashes:
            ref = self.find(block_hash)
            if ref is None:
                break
            refs.append(ref)
        return refs

    def find(self, block_hash: bytes) -> BlockRef | None:
        """The block that holds this content; None if no block is known to."""
        block_id = self._by_hash.get(block_hash)
        return None if block_id is None else BlockRef(block_id, self._blocks[block_id].generation)

    def take_cache_events(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Hashes (stored, evicted) since the last call; one that came and went is in neither."""
        events = self._cache_events
        self._cache_events = {}
        stored = tuple(block_hash for block_hash, is_stored in events.items() if is_stored)
        evicted = tuple(block_hash for block_hash, is_stored in events.items() if not is_stored)
        return stored, evicted

    # -- audit -------------------------------------------------------------------------------------

    def state(self, block_id: int) -> BlockState:
        return self._blocks[block_id].state

    def counts(self) -> BlockCounts:
        """The conservation audit's figures."""
        counts = self._counts
        return BlockCounts(
            total=self.num_blocks,
            free=counts[BlockState.FREE],
            owned=counts[BlockState.OWNED],
            in_flight=counts[BlockState.IN_FLIGHT] + counts[BlockState.DRAINING],
            cached=counts[BlockState.CACHED],
        )

    def check(self) -> None:
        """Recount everything and assert that all views of it agree."""
        counted = Counter(block.state for block in self._blocks)
        assert counted == +self._counts, (counted, self._counts)
        assert sum(counted.values()) == self.num_blocks
        free = [i for first, length in self._free.runs() for i in range(first, first + length)]
        assert free == self._in_state(BlockState.FREE), "free runs"
        assert sorted(self._cached) == self._in_state(BlockState.CACHED), "cached order"
        hashed = {
            block.block_hash: block_id
            for block_id, block in enumerate(self._blocks)
            if block.block_hash is not None
        }
        assert hashed == self._by_hash, "hash index"

    def _in_state(self, state: BlockState) -> list[int]:
        return [block_id for block_id, block in enumerate(self._blocks) if block.state is state]

    # -- the one way in ----------------------------------------------------------------------------

    def _apply(self, event: BlockEvent, refs: Iterable[BlockRef]) -> None:
        """Work out every change first, so that a refusal leaves nothing half done."""
        # ``refs`` may name a block twice: the second time starts from what the first time made.
        changed: dict[int, _Block] = {}
        for ref in refs:
            block = self._checked(ref)
            changed[ref.block_id] = _advance(changed.get(ref.block_id, block), event)
        for block_id, block in changed.items():
            self._set(block_id, block)

    def _checked(self, ref: BlockRef) -> _Block:
        if not 0 <= ref.block_id < self.num_blocks:
            raise StaleError(f"{ref} is not among {self.num_blocks} blocks")
        block = self._blocks[ref.block_id]
        if ref.generation != block.generation:
            raise StaleError(f"{ref} is of another generation than {block.generation}")
        return block

    def _set(self, block_id: int, after: _Block) -> None:
        """Put a changed block in place, and keep every view of it in step."""
        before = self._blocks[block_id]
        self._blocks[block_id] = after
        if before.block_hash != after.block_hash:
            self._index(block_id, before.block_hash, after.block_hash)
        left = before.state
        entered = after.state
        if left is entered:
            return
        self._counts[left] -= 1
        self._counts[entered] += 1
        if left is BlockState.CACHED:
            del self._cached[block_id]
        if entered is BlockState.CACHED:
            self._cached[block_id] = None
        elif entered is BlockState.FREE:
            self._free.add(block_id)

    def _index(self, block_id: int, before: bytes | None, after: bytes | None) -> None:
        if before is not None:
            del self._by_hash[before]
            self._note(before, is_stored=False)
        if after is not None:
            self._by_hash[after] = block_id
            self._note(after, is_stored=True)

    def _note(self, block_hash: bytes, *, is_stored: bool) -> None:
        if self._cache_events.get(block_hash, is_stored) != is_stored:
            del self._cache_events[block_hash]  # came and went
        else:
            self._cache_events[block_hash] = is_stored
