"""Block accounting against a model of itself, and the cases that the model does not name."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvcache.blocks import BlockPool, BlockState
from protocol.errors import IllegalTransition, StaleError
from protocol.kv import BlockRef
from tests.sizes import some_of

NUM_BLOCKS = 8
INDEX = st.integers(0, 1000)


class BlockLives(RuleBasedStateMachine):
    """Owners and transfers come and go in any order; the pool must keep the books."""

    @initialize()
    def start(self) -> None:
        self.pool = BlockPool(NUM_BLOCKS, block_size=4)
        self.owners: list[BlockRef] = []  # one entry for each owner
        self.transfers: list[BlockRef] = []
        self.hash_of: dict[BlockRef, bytes] = {}
        self.known: set[bytes] = set()  # what a listener to the cache events knows
        self.num_hashes = 0

    @rule(count=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, count: int) -> None:
        busy = {ref.block_id for ref in (*self.owners, *self.transfers)}
        assert self.pool.can_allocate(count) == (count <= NUM_BLOCKS - len(busy))
        if not self.pool.can_allocate(count):
            with pytest.raises(IllegalTransition):
                self.pool.allocate(count)
            return
        refs = self.pool.allocate(count)
        ids = {ref.block_id for ref in refs}
        assert len(ids) == count
        assert not ids & busy
        for old in [ref for ref in self.hash_of if ref.block_id in ids]:
            assert old not in refs, "a generation was used twice"
            del self.hash_of[old]
        # Whatever else was cached may have been evicted too, but only as many as were needed.
        self.hash_of = {r: h for r, h in self.hash_of.items() if self.pool.find(h) == r}
        self.owners.extend(refs)

    @precondition(lambda self: self.owners)
    @rule(index=INDEX)
    def release(self, index: int) -> None:
        self.pool.release([self.owners.pop(index % len(self.owners))])

    @precondition(lambda self: self.owners)
    @rule(index=INDEX)
    def begin_transfer(self, index: int) -> None:
        ref = self.owners[index % len(self.owners)]
        self.pool.begin_transfer([ref])
        self.transfers.append(ref)

    @precondition(lambda self: self.transfers)
    @rule(index=INDEX)
    def end_transfer(self, index: int) -> None:
        self.pool.end_transfer([self.transfers.pop(index % len(self.transfers))])

    @precondition(lambda self: self.owners)
    @rule(index=INDEX, again=st.booleans())
    def set_hash(self, index: int, again: bool) -> None:
        ref = self.owners[index % len(self.owners)]
        if ref in self.hash_of:
            return
        self.num_hashes += not again
        block_hash = str(self.num_hashes).encode()
        is_new = block_hash not in self.hash_of.values()
        assert self.pool.set_hash(ref, block_hash) == is_new
        if is_new:
            self.hash_of[ref] = block_hash

    @precondition(lambda self: self.hash_of)
    @rule(index=INDEX)
    def share(self, index: int) -> None:
        ref, block_hash = list(self.hash_of.items())[index % len(self.hash_of)]
        assert self.pool.match([block_hash, b"unknown"]) == [ref]
        self.pool.share([ref])
        self.owners.append(ref)

    @rule(block_id=st.integers(0, NUM_BLOCKS - 1), refused=st.sampled_from(["release", "share"]))
    def stale(self, block_id: int, refused: str) -> None:
        with pytest.raises(StaleError):
            getattr(self.pool, refused)([BlockRef(block_id, 10**6)])

    @rule()
    def take_cache_events(self) -> None:
        stored, evicted = self.pool.take_cache_events()
        assert not self.known & set(stored)
        assert set(evicted) <= self.known
        self.known = (self.known | set(stored)) - set(evicted)
        assert self.known == set(self.hash_of.values())

    @invariant()
    def conserved(self) -> None:
        self.pool.check()
        counts = self.pool.counts()
        parts = (counts.free, counts.owned, counts.in_flight, counts.cached)
        assert sum(parts) == counts.total == NUM_BLOCKS
        transfers, owners = set(self.transfers), set(self.owners)
        assert counts.in_flight == len(transfers)
        assert counts.owned == len(owners - transfers)
        assert counts.cached == len(set(self.hash_of) - owners - transfers)


BlockLives.TestCase.settings = settings(max_examples=some_of(60), stateful_step_count=40)
TestBlockLives = BlockLives.TestCase


def test_a_block_is_free_only_after_both_lifetimes() -> None:
    pool = BlockPool(1, block_size=4)
    refs = pool.allocate(1)
    pool.begin_transfer(refs)
    pool.release(refs)
    assert pool.state(0) is BlockState.DRAINING
    assert pool.counts().in_flight == 1
    assert not pool.can_allocate(1)
    with pytest.raises(IllegalTransition):
        pool.share(refs)  # nobody knows what is in it
    pool.end_transfer(refs)
    assert pool.state(0) is BlockState.FREE
    assert pool.allocate(1) == [BlockRef(0, 2)]


def test_a_prefix_can_be_shared_while_it_is_still_read() -> None:
    pool = BlockPool(1, block_size=4)
    refs = pool.allocate(1)
    pool.set_hash(refs[0], b"a")
    pool.begin_transfer(refs)
    pool.release(refs)
    pool.share(pool.match([b"a"]))
    assert pool.state(0) is BlockState.IN_FLIGHT
    pool.end_transfer(refs)
    assert pool.state(0) is BlockState.OWNED


def test_a_refusal_changes_nothing() -> None:
    pool = BlockPool(3, block_size=4)
    first, second, third = pool.allocate(3)
    pool.release([third])
    before = pool.counts()
    with pytest.raises(IllegalTransition):
        pool.release([first, second, third])
    with pytest.raises(IllegalTransition):
        pool.release([first, first])
    with pytest.raises(StaleError):
        pool.begin_transfer([first, BlockRef(second.block_id, 7)])
    with pytest.raises(StaleError):
        pool.share([first, BlockRef(99, 1)])
    assert pool.counts() == before
    pool.check()


def test_allocations_come_in_runs() -> None:
    pool = BlockPool(16, block_size=4)
    refs = pool.allocate(16)
    pool.release([refs[i] for i in (2, 3, 7, 8, 9, 10, 13)])
    assert [ref.block_id for ref in pool.allocate(1)] == [13]  # the hole that it fills
    assert [ref.block_id for ref in pool.allocate(3)] == [7, 8, 9]
    assert [ref.block_id for ref in pool.allocate(1, after=refs[1])] == [2]
    assert sorted(ref.block_id for ref in pool.allocate(2)) == [3, 10]


def test_the_least_recently_used_tail_is_evicted_first() -> None:
    pool = BlockPool(4, block_size=4)
    first, second = pool.allocate(2), pool.allocate(2)
    for ref, block_hash in zip((*first, *second), (b"a", b"b", b"c", b"d"), strict=True):
        pool.set_hash(ref, block_hash)
    pool.release(first)
    pool.release(second)
    pool.share(pool.match([b"a", b"b"]))
    pool.release(first)  # now used later than the second
    assert pool.take_cache_events() == ((b"a", b"b", b"c", b"d"), ())
    pool.allocate(1)
    assert pool.take_cache_events() == ((), (b"d",))
    pool.allocate(2)
    assert pool.take_cache_events() == ((), (b"c", b"b"))
    assert pool.match([b"a"]) == [first[0]]


def test_the_first_holder_of_a_content_keeps_it() -> None:
    pool = BlockPool(2, block_size=4)
    first, second = pool.allocate(2)
    assert pool.set_hash(first, b"a")
    assert not pool.set_hash(second, b"a")
    pool.release([second])
    assert pool.counts().free == 1
    assert pool.find(b"a") == first


def test_what_is_forgotten_is_found_no_more_and_stays_with_its_owners() -> None:
    pool = BlockPool(4, 16)
    owned, moving, draining, cached = pool.allocate(4)
    for number, ref in enumerate((owned, moving, draining, cached)):
        assert pool.set_hash(ref, bytes([number]))
    pool.begin_transfer([moving, draining])
    pool.release([draining, cached])
    pool.take_cache_events()
    pool.forget([bytes([number]) for number in range(5)])
    pool.check()
    assert all(pool.find(bytes([number])) is None for number in range(4))
    assert pool.take_cache_events()[1] == tuple(bytes([number]) for number in range(4))
    assert [pool.state(ref.block_id) for ref in (owned, moving, draining, cached)] == [
        BlockState.OWNED,
        BlockState.IN_FLIGHT,
        BlockState.DRAINING,
        BlockState.FREE,
    ]
    pool.end_transfer([moving, draining])
    pool.release([owned, moving])
    assert pool.counts().free == 4
