"""The set of block hashes against a set of Python's."""

from hypothesis import given
from hypothesis import strategies as st

from coordinator.cluster.hash_set import HashSet

# Few bytes of few values: keys that repeat, and that are found across the border of two others.
HASHES = st.binary(min_size=16, max_size=16) | st.lists(
    st.integers(0, 1), min_size=16, max_size=16
).map(bytes)
CHANGES = st.lists(st.tuples(st.booleans(), st.lists(HASHES, max_size=40)), max_size=30)


@given(CHANGES)
def test_it_holds_what_a_set_holds(changes: list[tuple[bool, list[bytes]]]) -> None:
    ours, model = HashSet(), set[bytes]()
    for is_added, hashes in changes:
        if is_added:
            ours.update(hashes)
            model.update(hashes)
        else:
            ours.difference_update(hashes)
            model.difference_update(hashes)
        assert len(ours) == len(model)
        assert all((block_hash in ours) == (block_hash in model) for block_hash in hashes)
    assert all(block_hash in ours for block_hash in model)


def test_it_grows_a_bucket_at_a_time_and_loses_nothing() -> None:
    hashes = [(number * 0x9E3779B97F4A7C15 % (1 << 64)).to_bytes(16, "little") for number in
              range(20_000)]  # fmt: skip
    ours = HashSet()
    ours.update(hashes)
    assert len(ours) == 20_000
    assert all(block_hash in ours for block_hash in hashes)
    ours.difference_update(hashes[::2])
    assert len(ours) == 10_000
    assert [block_hash in ours for block_hash in hashes[:100]] == [False, True] * 50
