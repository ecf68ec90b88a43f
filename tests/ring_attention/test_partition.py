"""Dealing and partitioning, by properties."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.plans import ChunkWork, PlacedBlock
from ring_attention.partition import Partition, Shard, deal_zigzag
from tests.sizes import some_of

SIZES = st.integers(1, 16)


@given(num_blocks=st.integers(0, 600), ring_size=SIZES)
def test_every_block_has_one_owner(num_blocks: int, ring_size: int) -> None:
    dealt = deal_zigzag(num_blocks, ring_size)
    assert len(dealt) == ring_size
    assert sorted(block for blocks in dealt for block in blocks) == list(range(num_blocks))
    assert all(list(blocks) == sorted(blocks) for blocks in dealt)


@given(num_blocks=st.integers(0, 600), ring_size=SIZES)
def test_shares_differ_by_one_block_at_most(num_blocks: int, ring_size: int) -> None:
    sizes = [len(blocks) for blocks in deal_zigzag(num_blocks, ring_size)]
    assert max(sizes) - min(sizes) <= 1


@given(num_blocks=st.integers(1, 600), ring_size=SIZES, num_cached=st.integers(0, 2000))
def test_causal_work_is_even_up_to_one_block_row(
    num_blocks: int, ring_size: int, num_cached: int
) -> None:
    """Work in pairs of blocks: a block sees all cached ones, all before it, and half of itself."""
    work = [
        sum(num_cached + block + 0.5 for block in blocks)
        for blocks in deal_zigzag(num_blocks, ring_size)
    ]
    assert max(work) - sum(work) / ring_size <= num_cached + num_blocks


def test_zigzag_is_exactly_even_when_it_can_be() -> None:
    assert deal_zigzag(8, 2) == ((0, 1, 6, 7), (2, 3, 4, 5))
    assert deal_zigzag(2, 2) == ((0,), (1,))
    assert deal_zigzag(1, 4) == ((0,), (), (), ())


def chunk(owners: list[int], start: int, num_tokens: int, ring: tuple[int, ...]) -> ChunkWork:
    blocks = tuple(PlacedBlock(i, owner, 100 + i, 0) for i, owner in enumerate(owners))
    return ChunkWork("r", 0, 0, start, (7,) * num_tokens, ring, False, blocks, True)


@st.composite
def chunks(draw: st.DrawFn) -> tuple[ChunkWork, int]:
    block_size = draw(st.integers(1, 5))
    num_prefix = draw(st.integers(0, 12))
    num_tokens = draw(st.integers(1, 40))
    ring = tuple(draw(st.permutations(range(draw(st.integers(1, 5))))))
    num_blocks = num_prefix - (-num_tokens // block_size)
    owners = draw(st.lists(st.sampled_from(ring), min_size=num_blocks, max_size=num_blocks))
    return chunk(owners, num_prefix * block_size, num_tokens, ring), block_size


def positions(shard: Shard) -> list[int]:
    return [position for start, end in shard.key_spans for position in range(start, end)]


@settings(max_examples=some_of(300))
@given(chunks(), st.one_of(st.none(), st.integers(1, 60)))
def test_every_visible_pair_is_seen_once(
    work_and_block_size: tuple[ChunkWork, int], window: int | None
) -> None:
    """Any deal, not only zigzag: sights cover just what a causal window lets through."""
    work, block_size = work_and_block_size
    partition = Partition(work, block_size, window)
    seen = set()
    for q_index in range(partition.size):
        for k_index, shard in enumerate(partition.shards):
            keys = positions(shard)
            for sight in partition.visible_keys(q_index, k_index):
                assert sight.first_key < sight.end_key
                for query in range(sight.run.start, sight.run.end):
                    for key in keys[sight.first_key : sight.end_key]:
                        cut = sight.window is not None and key <= query - sight.window
                        if not cut and not (sight.causal and key > query):
                            assert (query, key) not in seen
                            seen.add((query, key))
    oldest = 10**9 if window is None else window
    end = work.start + len(work.token_ids)
    assert seen == {
        (query, key)
        for query in range(work.start, end)
        for key in range(max(0, query - oldest + 1), query + 1)
    }


@given(chunks(), st.one_of(st.none(), st.integers(1, 60)))
def test_messages_travel_as_far_as_needed_and_no_further(
    work_and_block_size: tuple[ChunkWork, int], window: int | None
) -> None:
    partition = Partition(*work_and_block_size, window)
    for index in range(partition.size):
        others = [(index + hop) % partition.size for hop in range(1, partition.size)]
        keys_met = [bool(partition.visible_keys(other, index)) for other in others]
        queries_met = [bool(partition.visible_keys(index, other)) for other in others]
        for hops, met in (
            (partition.kv_hops(index), keys_met),
            (partition.q_hops(index), queries_met),
        ):
            assert not any(met[hops:])
            assert hops == 0 or met[hops - 1]


def test_a_rank_sees_its_runs_and_its_diagonal_first() -> None:
    work = chunk([0, 1, 0, 1, 1, 0], start=8, num_tokens=14, ring=(0, 1))  # blocks of 4, 2 cached
    partition = Partition(work, 4)
    rank0, rank1 = partition.shards
    assert [(run.start, run.end, run.offset) for run in rank0.runs] == [(8, 12, 0), (20, 22, 4)]
    assert [(run.start, run.end) for run in rank1.runs] == [(12, 20)]
    assert rank0.key_spans == ((0, 4), (8, 12), (20, 22)) and rank0.num_keys == 10
    assert rank0.num_tokens == 6
    own = [(s.first_key, s.end_key, s.causal) for s in partition.visible_keys(0, 0)]
    assert own == [(4, 8, True), (0, 4, False), (8, 10, True), (0, 8, False)]
    assert [(s.first_key, s.end_key) for s in partition.visible_keys(0, 1)] == [(0, 4), (0, 12)]


def test_a_window_leaves_out_what_nobody_sees() -> None:
    work = chunk([0, 1, 0, 1], start=12, num_tokens=4, ring=(0, 1))
    partition = Partition(work, 4, window=3)
    assert [shard.block_ids for shard in partition.shards] == [(102,), (103,)]


def test_an_owner_outside_the_ring_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="not in the ring"):
        Partition(chunk([0, 2], start=4, num_tokens=4, ring=(0, 1)), 4)
