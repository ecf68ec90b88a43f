"""Placement, as properties: the home first, then the prefix, then the wait; the remainder rule."""

from hypothesis import given
from hypothesis import strategies as st

from coordinator.cluster.router import (
    Candidate,
    PrefixMap,
    SessionTable,
    choose_decode,
    choose_prefill,
    computes_here,
)

speeds = st.one_of(st.just(0.0), st.floats(1.0, 1e6))
candidate_lists = st.lists(
    st.builds(
        Candidate,
        st.sampled_from("abcdefgh"),
        st.integers(0, 4).map(lambda n: n * 32),
        st.integers(0, 10_000),
        speeds,
    ),
    max_size=8,
    unique_by=lambda c: c.pool_id,
)


@given(candidate_lists, st.sampled_from([None, *"abcdefgh"]))
def test_decode(candidates: list[Candidate], home: str | None) -> None:
    chosen = choose_decode(candidates, home)
    if not candidates:
        assert chosen is None
        return
    assert chosen in candidates
    assert chosen is not None
    if home in [c.pool_id for c in candidates]:
        assert chosen.pool_id == home
        return
    assert chosen.num_cached_tokens == max(c.num_cached_tokens for c in candidates)
    rivals = [c for c in candidates if c.num_cached_tokens == chosen.num_cached_tokens]
    known = [c.tokens_per_s for c in candidates if c.tokens_per_s]
    typical = sum(known) / len(known) if known else 1.0
    assert chosen.wait_s(typical) == min(c.wait_s(typical) for c in rivals)


@given(candidate_lists, st.randoms())
def test_the_order_of_candidates_does_not_matter(
    candidates: list[Candidate], random: object
) -> None:
    shuffled = candidates[:]
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis' random has no public type
    assert choose_prefill(shuffled) == choose_prefill(candidates)
    assert choose_decode(shuffled, None) == choose_decode(candidates, None)


def test_load_is_weighted_by_speed() -> None:
    slow, fast = Candidate("a", 0, 100, 10.0), Candidate("b", 0, 500, 100.0)
    chosen = choose_prefill([slow, fast])
    assert chosen is fast


@given(st.integers(1, 10_000), st.integers(0, 10_000), st.integers(0, 1000))
def test_remainder(num_prompt: int, num_cached: int, threshold: int) -> None:
    num_cached = min(num_cached, num_prompt)
    assert computes_here(num_prompt, num_cached, threshold) is (
        num_prompt - num_cached <= threshold
    )


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 5))))
def test_sessions_like_a_plain_model(uses: list[tuple[int, int, int]]) -> None:
    table, now = SessionTable(ttl_s=7.0), 0.0
    model: dict[int, tuple[str, float]] = {}
    for session, pool, pause in uses:
        now += pause
        key = ("tenant", str(session))
        pool_id, expires = model.get(session, (None, 0.0))
        assert table.home(key, now) == (pool_id if now < expires else None)
        table.settle(key, f"decode{pool}", now)
        model[session] = (f"decode{pool}", now + 7.0)
        assert len(table) == sum(expires > now for _, expires in model.values())


def test_sessions_are_of_their_tenant_bounded_and_lost_with_the_pool() -> None:
    table = SessionTable(ttl_s=10.0, max_sessions=2)
    table.settle(("a", "s"), "decode0", 0.0)
    assert table.home(("b", "s"), 0.0) is None
    assert table.home(("a", "s"), 9.9) == "decode0"
    assert table.home(("a", "s"), 10.0) is None
    table.settle(("a", "t"), "decode1", 1.0)
    table.settle(("a", "u"), "decode0", 1.0)
    assert table.home(("a", "s"), 1.0) is None
    table.forget_pool("decode1")
    assert table.home(("a", "t"), 1.0) is None
    assert table.home(("a", "u"), 1.0) == "decode0"


@given(st.lists(st.integers(0, 9)), st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)))
def test_prefixes(prompt: list[int], stored: set[int], evicted: set[int]) -> None:
    def name(numbers: list[int] | set[int]) -> list[bytes]:
        return [bytes([number] * 16) for number in numbers]

    prefixes = PrefixMap()
    prefixes.update("a", name(stored), ())
    prefixes.update("a", (), name(evicted))
    count = prefixes.num_cached_blocks("a", name(prompt))
    held = stored - evicted
    assert set(prompt[:count]) <= held
    assert count == len(prompt) or prompt[count] not in held
    assert prefixes.num_cached_blocks("b", name(prompt)) == 0
    prefixes.forget_pool("a")
    assert prefixes.num_cached_blocks("a", name(prompt)) == 0
