"""Block hashes, and prefixes that are spread over several pools."""

import hashlib

import hypothesis.strategies as st
from hypothesis import given

from kvcache.blocks import BlockPool
from kvcache.prefix import hash_blocks, match_prefix, take_cache_events
from protocol.kv import BlockRef

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@given(TOKENS, TOKENS, st.integers(1, 8))
def test_equal_hashes_mean_equal_tokens_up_to_there(
    first: list[int], second: list[int], block_size: int
) -> None:
    hashes = [hash_blocks(tokens, block_size, "model") for tokens in (first, second)]
    assert [len(h) for h in hashes] == [len(first) // block_size, len(second) // block_size]
    for index, (one, other) in enumerate(zip(*hashes, strict=False)):
        end = (index + 1) * block_size
        assert (one == other) == (first[:end] == second[:end])


def test_salt_and_position_are_part_of_the_hash() -> None:
    tokens = [1, 2, 3, 4, 1, 2, 3, 4]
    hashes = [hash_blocks(tokens, 4, salt) for salt in ("model", "modelA", "modelB")]
    assert len({h for chain in hashes for h in chain}) == 6
    assert all(len(h) == 16 for chain in hashes for h in chain)


def test_the_hash_is_the_same_everywhere() -> None:
    def blake2b(content: bytes) -> bytes:
        return hashlib.blake2b(content, digest_size=16).digest()

    first = blake2b(blake2b(b"model") + bytes([1, 0, 0, 0, 0, 1, 0, 0]))
    second = blake2b(first + bytes([3, 0, 0, 0, 4, 0, 0, 0]))
    assert hash_blocks([1, 256, 3, 4, 5], 2, "model") == [first, second]


@given(st.lists(st.sampled_from([(), (0,), (1,), (2,), (0, 2)]), max_size=12))
def test_a_prefix_may_have_any_owner_map(owners: list[tuple[int, ...]]) -> None:
    pools = [BlockPool(12, block_size=4) for _ in range(3)]
    hashes = [bytes([index]) for index in range(len(owners))]
    held: dict[bytes, tuple[int, BlockRef]] = {}
    for block_hash, ranks in zip(hashes, owners, strict=True):
        for rank in ranks:
            (ref,) = pools[rank].allocate(1)
            pools[rank].set_hash(ref, block_hash)
            held.setdefault(block_hash, (rank, ref))
    length = owners.index(()) if () in owners else len(owners)
    assert match_prefix(pools, hashes) == [held[block_hash] for block_hash in hashes[:length]]


def test_a_hash_is_gone_only_when_no_pool_has_it() -> None:
    pools = [BlockPool(1, block_size=4), BlockPool(1, block_size=4)]
    for pool in pools:
        refs = pool.allocate(1)
        pool.set_hash(refs[0], b"a")
        pool.release(refs)
    assert take_cache_events(pools) == ((b"a",), ())
    pools[0].allocate(1)
    assert take_cache_events(pools) == ((b"a",), ())
    pools[1].allocate(1)
    assert take_cache_events(pools) == ((), (b"a",))
    assert take_cache_events(pools) == ((), ())
