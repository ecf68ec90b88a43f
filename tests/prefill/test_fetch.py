"""A prefix that the decode pool holds: fetched before the first chunk, or computed after all."""

from collections.abc import Callable
from typing import Any

import pytest

from protocol.messages import CacheUpdate, FirstToken, Released, RequestFailed


def run(pool: Any) -> list[Any]:
    """All work that there is to do."""
    work = []
    while plan := pool.step():
        work += plan.work
    return work


def assert_empty(pool: Any) -> None:
    pool.scheduler.check()
    load = pool.scheduler.load()
    assert (load.num_waiting, load.num_running, load.pending_tokens) == (0, 0, 0)
    for counts in load.blocks:
        assert counts.free + counts.cached == counts.total


def test_one_fetch_from_arrival_to_release(make_pool: Callable, prompt: Callable) -> None:
    pool = make_pool(2, tp_size=2, fetch_from=1)
    pool.add(prompt("a", 150, num_target_tokens=80))

    # All blocks of the prompt are granted, and 20 of them are expected to be filled from outside.
    assert pool.step() is None
    opened = pool.fetches["a", 1]
    assert (opened.first_logical, len(opened.blocks), len(opened.owners)) == (0, 20, 20)
    assert opened.owners.count(0) == opened.owners.count(1) == 10
    counts = pool.scheduler.load().blocks
    assert sum(c.owned + c.in_flight for c in counts) == 38
    assert sum(c.in_flight for c in counts) == 20
    assert pool.scheduler.load().num_running == 1 and pool.scheduler.load().pending_tokens == 70

    # Only when every rank expects them is the decode pool asked.
    assert not pool.asked
    pool.open_fetch("a")
    asked = pool.asked["a", 1]
    assert (asked.source_pool_id, asked.source_epoch, asked.first_logical) == ("decode0", 7, 0)
    assert asked.owners == opened.owners
    assert pool.step() is None

    # They can be hit from now on, and what follows them is computed and moved.
    pool.fetched("a")
    [update] = pool.of(CacheUpdate)
    assert len(update.stored) == 20
    assert sum(c.in_flight for c in pool.scheduler.load().blocks) == 0
    work = run(pool)
    assert [item.start for item in work] == [80]
    assert work[0].announce_cached == () and work[0].chunk == 1
    assert set(pool.commits["a", 1].manifest) == pool.announced["a", 1]
    assert {logical for _, _, logical in pool.sent["a", 1]} == set(range(20, 38))
    [first] = pool.of(FirstToken)
    path = first.path
    assert (path.num_cached_tokens, path.num_fetched_tokens) == (0, 80)
    assert (path.num_computed_tokens, path.num_moved_tokens) == (70, 70)
    assert pool.scheduler.num_fetched_tokens == 80
    pool.close("a")
    assert pool.of(Released) == [Released("a", 1)]
    assert_empty(pool)


def test_only_what_the_own_cache_misses_is_fetched(make_pool: Callable, prompt: Callable) -> None:
    pool = make_pool(2, fetch_from=1)
    pool.add(prompt("a", 100))
    run(pool)
    pool.close("a")
    pool.add(prompt("b", 180, num_target_tokens=160))
    pool.step()
    assert (pool.fetches["b", 1].first_logical, len(pool.fetches["b", 1].blocks)) == (25, 15)
    pool.open_fetch("b")
    pool.fetched("b")
    [work] = run(pool)
    assert work.start == 160
    path = pool.of(FirstToken)[-1].path
    assert (path.num_cached_tokens, path.num_fetched_tokens) == (100, 60)
    assert path.num_computed_tokens == 20
    pool.close("b")
    assert_empty(pool)


def test_the_last_token_is_computed_even_if_all_is_held(
    make_pool: Callable, prompt: Callable
) -> None:
    pool = make_pool(2, fetch_from=1)
    pool.add(prompt("a", 32, num_target_tokens=32))
    pool.step()
    pool.open_fetch("a")
    pool.fetched("a")
    [work] = run(pool)
    assert (work.start, len(work.token_ids), work.is_last) == (28, 4, True)
    assert pool.commits["a", 1].manifest == ()
    pool.close("a")
    assert_empty(pool)


@pytest.mark.parametrize(("fetch_from", "num_held"), [(41, 40), (1, 0), (1, 3)])
def test_too_little_is_computed_not_fetched(
    make_pool: Callable, prompt: Callable, fetch_from: int, num_held: int
) -> None:
    pool = make_pool(fetch_from=fetch_from)
    pool.add(prompt("a", 60, num_target_tokens=num_held // 4 * 4))
    assert pool.step().work[0].start == 0
    assert not pool.fetches


@pytest.mark.parametrize("when", ["opening", "asked"])
def test_a_broken_fetch_is_computed_in_its_turn(
    make_pool: Callable, prompt: Callable, when: str
) -> None:
    pool = make_pool(2, fetch_from=1)
    pool.add(prompt("a", 100, num_target_tokens=80))
    pool.step()
    if when == "asked":
        pool.open_fetch("a")
    for _ in range(2):
        pool.break_fetch("a")
    assert pool.closing_fetch == [("a", 1)]
    pool.open_fetch("a")
    assert pool.step() is None, "bytes may still land in its blocks"
    assert sum(c.in_flight for c in pool.scheduler.load().blocks) == 20
    pool.close_fetch("a")
    assert all(c.free == c.total for c in pool.scheduler.load().blocks)
    pool.add(prompt("b", 100))  # the same prefix: it is the older one that computes it
    work = run(pool)
    assert [(item.request_id, item.start) for item in work] == [("a", 0), ("a", 64), ("b", 96)]
    assert not pool.of(RequestFailed) and pool.closing == []
    path = pool.of(FirstToken)[0].path
    assert (path.num_fetched_tokens, path.num_computed_tokens, path.num_moved_tokens) == (
        0, 100, 20,
    )  # fmt: skip
    pool.close("a")
    pool.close("b")
    assert_empty(pool)


@pytest.mark.parametrize("opened", [False, True])
def test_a_fetch_that_nobody_answers_is_given_up_in_time(
    make_pool: Callable, prompt: Callable, opened: bool
) -> None:
    pool = make_pool(2, fetch_from=1)
    pool.add(prompt("a", 100, num_target_tokens=80))
    pool.step()
    if opened:
        pool.open_fetch("a")
    pool.now += pool.scheduler.facts.fetch_timeout_s - 1.0
    assert pool.step() is None and pool.closing_fetch == [], "there is time left"
    pool.now += 1.1
    assert pool.step() is None and pool.closing_fetch == [("a", 1)]
    pool.now += 1000.0
    assert pool.step() is None, "bytes may still land in its blocks"
    if opened:
        pool.fetched("a")  # too late
    pool.close_fetch("a")
    assert [(item.request_id, item.start) for item in run(pool)] == [("a", 0), ("a", 64)]
    assert pool.of(FirstToken)[0].path.num_fetched_tokens == 0
    pool.close("a")
    assert_empty(pool)


@pytest.mark.parametrize("crosses", [False, True])
@pytest.mark.parametrize("state", ["opening", "asked", "returning"])
def test_an_abort_while_fetching_waits_for_the_last_byte(
    make_pool: Callable, prompt: Callable, state: str, crosses: bool
) -> None:
    pool = make_pool(2, fetch_from=1)
    pool.add(prompt("a", 100, num_target_tokens=80))
    pool.step()
    if state != "opening":
        pool.open_fetch("a")
    if state == "returning":
        pool.break_fetch("a")
    for _ in range(2):
        pool.abort("a")
    assert pool.closing_fetch == [("a", 1)] and pool.closing == []
    if crosses:
        pool.fetched("a")  # it was complete before the order to close came
        pool.break_fetch("a")
    assert pool.of(Released) == []
    assert sum(c.in_flight for c in pool.scheduler.load().blocks) == 20
    pool.close_fetch("a")
    assert pool.of(Released) == [Released("a", 1)]
    assert pool.of(CacheUpdate) == []
    assert pool.step() is None
    assert_empty(pool)


def test_a_decode_pool_that_goes_while_it_is_read_from(
    make_pool: Callable, prompt: Callable
) -> None:
    pool = make_pool(fetch_from=1)
    pool.add(prompt("a", 100, num_target_tokens=80))
    pool.step()
    pool.set_pools()
    assert [failed.code for failed in pool.of(RequestFailed)] == ["stale_target"]
    assert pool.of(Released) == []
    pool.close_fetch("a")
    assert_empty(pool)


def test_others_wait_for_a_prefix_that_is_being_fetched(
    make_pool: Callable, prompt: Callable
) -> None:
    pool = make_pool(fetch_from=1)
    pool.add(prompt("a", 100, num_target_tokens=80))
    pool.step()
    pool.add(prompt("b", 90))
    pool.add(prompt("c", 20, first=500))
    assert [item.request_id for item in pool.step().work] == ["c"], "only c has nothing to wait for"
    assert pool.step() is None
    pool.open_fetch("a")
    pool.fetched("a")
    assert [(item.request_id, item.start) for item in run(pool)] == [("a", 80), ("b", 88)]
    for request_id in "abc":
        pool.close(request_id)
    assert_empty(pool)
