"""The prefill scheduler, step by step: one life at a time."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from kvtransfer.events import ControlReceived, HandoffBroken
from prefill.states import RequestState
from protocol.handoff import SegmentKey
from protocol.messages import (
    Ask,
    CacheUpdate,
    FirstToken,
    Prefill,
    Progress,
    Released,
    RequestFailed,
)
from protocol.request import FinishReason, SamplingParams


def assert_empty(pool: Any) -> None:
    pool.scheduler.check()
    load = pool.scheduler.load()
    assert (load.num_waiting, load.num_running, load.pending_tokens) == (0, 0, 0)
    for counts in load.blocks:
        assert counts.free + counts.cached == counts.total


def test_one_prefill_from_arrival_to_release(make_pool: Callable, prompt: Callable) -> None:
    pool = make_pool(2, tp_size=2)
    pool.add(prompt("a", 150))
    assert pool.scheduler.load().pending_tokens == 150

    # The first chunk: 64 tokens on the ring of two, dealt in zigzag; nothing is told yet.
    plan = pool.scheduler.schedule(0.0)
    [work] = plan.work
    assert (work.chunk, work.start, len(work.token_ids), work.ring) == (1, 0, 64, (0, 1))
    assert [block.cp_rank for block in work.blocks] == [0] * 4 + [1] * 8 + [0] * 4
    assert not work.is_last and work.sampling is None
    assert pool.messages == []
    counts = pool.scheduler.load().blocks
    assert [(c.owned, c.in_flight) for c in counts] == [(11, 8), (11, 8)]

    # Its end: progress, and its full blocks can be hit.
    pool.finish(plan)
    assert pool.of(Progress) == [Progress("a", 1, 0, 150), Progress("a", 1, 64, 150)]
    [update] = pool.of(CacheUpdate)
    assert len(update.stored) == 16

    # The rest, with the first token at once and the manifest for the transfer thread.
    plan = pool.step()
    assert plan.work[0].chunk == 2 and plan.work[0].start == 64
    [work] = pool.step().work
    assert work.is_last and (work.start, work.chunk) == (128, 3)
    assert len(work.blocks) == 38 and work.sampling is not None
    [first] = pool.of(FirstToken)
    assert (first.token_id, first.finish_reason) == (9, None)
    assert (first.path.ring_size, first.path.num_chunks) == (2, 3)
    assert (first.path.num_computed_tokens, first.path.num_moved_tokens) == (150, 150)
    commit = pool.commits["a", 1]
    assert set(commit.manifest) == pool.announced["a", 1]
    assert len(commit.manifest) == 4 * 3 * 2  # ranks, chunks, groups of layers
    assert pool.all_announced["a", 1] == {0, 1, 2, 3}
    assert pool.step() is None

    # Blocks are given back when the last read has ended, and not before.
    assert sum(c.in_flight for c in pool.scheduler.load().blocks) == 38
    assert pool.of(Released) == []
    pool.close("a")
    assert pool.of(Released) == [Released("a", 1)]
    assert_empty(pool)
    assert sum(c.cached for c in pool.scheduler.load().blocks) == 37  # the 38th is not full


def test_what_is_cached_is_announced_not_computed(make_pool: Callable, prompt: Callable) -> None:
    pool = make_pool(2)
    pool.add(prompt("a", 150))
    while pool.step():
        pass
    pool.close("a")
    pool.add(prompt("b", 150, num_target_tokens=40))
    [work] = pool.step().work
    # 37 full blocks are cached; the target has the first 10 of them.
    assert (work.start, len(work.token_ids), work.is_last) == (148, 2, True)
    assert [block.logical for block in work.announce_cached] == list(range(10, 37))
    assert work.route.first_logical == 10
    manifest = pool.commits["b", 1].manifest
    assert set(manifest) == pool.announced["b", 1]
    assert SegmentKey(0, 0, 0, 6) in manifest and SegmentKey(1, 0, 0, 6) in manifest
    [_, first] = pool.of(FirstToken)
    assert (first.path.num_cached_tokens, first.path.num_computed_tokens) == (148, 2)
    assert first.path.num_moved_tokens == 110
    pool.close("b")
    assert_empty(pool)


def test_the_last_token_is_computed_even_if_all_is_cached(
    make_pool: Callable, prompt: Callable
) -> None:
    pool = make_pool(1)
    for request_id in ("a", "b"):
        pool.add(prompt(request_id, 32))
        [work] = pool.step().work
        pool.close(request_id)
    assert (work.start, len(work.token_ids)) == (28, 4)
    assert_empty(pool)


def test_a_tenants_cache_is_its_own(make_pool: Callable, prompt: Callable) -> None:
    pool = make_pool(1)
    for request_id, salt in (("a", "x"), ("b", "y")):
        pool.add(prompt(request_id, 32, salt=salt))
        [work] = pool.step().work
        assert work.start == 0
        pool.close(request_id)


def test_a_target_that_holds_all_blocks_is_sent_none(make_pool: Callable, prompt: Callable) -> None:
    pool = make_pool(2)
    pool.add(prompt("a", 32, num_target_tokens=32))
    pool.step()
    assert pool.commits["a", 1].manifest == ()
    assert pool.all_announced["a", 1] == {0, 1}
    pool.close("a")
    assert_empty(pool)


def test_a_short_prompt_is_served_between_a_long_ones_chunks(
    make_pool: Callable, prompt: Callable
) -> None:
    pool = make_pool(2)
    pool.add(prompt("long", 192))
    pool.step()
    pool.add(prompt("short", 20, first=500))
    order = []
    while plan := pool.step():
        order.append([work.request_id for work in plan.work])
    assert order == [["short"], ["long"], ["long"]]


def test_short_prompts_take_a_rank_each(make_pool: Callable, prompt: Callable) -> None:
    pool = make_pool(4, step_target_s=0.025)
    for i in range(4):
        pool.add(prompt(f"r{i}", 20, first=100 * i))
    plan = pool.step()
    assert sorted(work.ring for work in plan.work) == [(0,), (1,), (2,), (3,)]


def test_a_stream_of_short_prompts_does_not_starve_a_long_one(
    make_pool: Callable, prompt: Callable
) -> None:
    pool = make_pool(1, num_blocks=256)
    pool.add(prompt("long", 160))
    served = []
    for i in range(12):
        pool.add(prompt(f"s{i}", 20, first=7 * i + 1))
        served += [work.request_id for work in pool.step().work]
    assert served.count("long") >= 4


def test_requests_wait_for_blocks_in_order(make_pool: Callable, prompt: Callable) -> None:
    pool = make_pool(1, num_blocks=16, step_target_s=10.0)
    pool.add(prompt("a", 40))
    pool.add(prompt("b", 40, first=1))
    pool.add(prompt("c", 8, first=2))  # would fit, but b is older
    plans = [pool.step() for _ in range(3)]
    assert [[work.request_id for work in plan.work] for plan in plans[:1]] == [["a"]]
    assert plans[1] is None
    pool.close("a")
    assert [work.request_id for work in pool.step().work] == ["b", "c"]
    pool.close("b")
    pool.close("c")
    assert_empty(pool)


def test_a_cached_prefix_never_keeps_a_prompt_waiting(
    make_pool: Callable, prompt: Callable
) -> None:
    """All of rank 0 is the prompt's own cached prefix: better to forget it than to wait."""
    pool = make_pool(2, num_blocks=8, ring_from=1000)
    pool.add(prompt("a", 32))
    pool.step()
    pool.close("a")
    pool.add(prompt("b", 60))
    while pool.step():
        pass
    assert ("b", 1) in pool.commits
    pool.close("b")
    assert_empty(pool)


def test_a_prefix_that_is_being_computed_is_waited_for(
    make_pool: Callable, prompt: Callable
) -> None:
    """Two questions about one document, asked at once: it is computed once."""
    pool = make_pool(1, step_target_s=10.0)
    pool.add(prompt("a", 80))
    pool.add(prompt("b", 82))
    pool.add(prompt("c", 82, salt="another tenant's"))
    plans = []
    while plan := pool.step():
        plans.append([(work.request_id, work.start) for work in plan.work])
    assert plans[-1] == [("b", 80)] and len(plans) == 4
    assert all([work[0] for work in plan] == ["a", "c"] for plan in plans[:-1])
    for request_id in "abc":
        pool.close(request_id)
    assert_empty(pool)


def test_who_waits_for_a_prefix_goes_on_alone_after_an_abort(
    make_pool: Callable, prompt: Callable
) -> None:
    pool = make_pool(1)
    pool.add(prompt("a", 80))
    pool.add(prompt("b", 82))
    pool.step()
    pool.abort("a")
    [work] = pool.step().work
    assert (work.request_id, work.start) == ("b", 32)  # what a had computed is there


def test_what_never_fits_fails(make_pool: Callable, prompt: Callable) -> None:
    pool = make_pool(2, num_blocks=8)
    pool.add(prompt("a", 65))
    [failed] = pool.of(RequestFailed)
    assert failed.code == "kv_capacity_exceeded"
    assert "65" in failed.message and "64" in failed.message
    assert pool.of(Released) == [Released("a", 1)]
    assert pool.step() is None
    assert_empty(pool)


@pytest.mark.parametrize("tokens", [0, -1])
def test_a_prompt_that_no_model_can_take_fails(
    make_pool: Callable, prompt: Callable, tokens: int
) -> None:
    pool = make_pool()
    ids = () if tokens == 0 else (5, 1000)
    pool.add(msgspec.structs.replace(prompt("a", 4), prompt_token_ids=ids))
    assert [failed.code for failed in pool.of(RequestFailed)] == ["invalid_prompt"]


def test_a_stale_target_fails(make_pool: Callable, prompt: Callable) -> None:
    pool = make_pool()
    pool.add(prompt("a", 10, epoch=3))
    assert [failed.code for failed in pool.of(RequestFailed)] == ["stale_target"]
    assert_empty(pool)


def test_a_target_that_starts_again_ends_what_goes_there(
    make_pool: Callable, prompt: Callable
) -> None:
    pool = make_pool()
    pool.add(prompt("a", 90))
    pool.step()
    pool.set_pools(decode0=8)
    assert [failed.code for failed in pool.of(RequestFailed)] == ["stale_target"]
    assert pool.closing == [("a", 1)]
    assert pool.step() is None
    pool.close("a", committed=False)
    assert pool.of(Released) == [Released("a", 1)]
    assert_empty(pool)


@pytest.mark.parametrize("when", ["waiting", "planned", "running", "handing_over", "closing"])
def test_an_abort_ends_in_one_release(make_pool: Callable, prompt: Callable, when: str) -> None:
    pool = make_pool()
    pool.add(prompt("a", 60))
    plan = None
    if when == "planned":
        plan = pool.scheduler.schedule(0.0)
    elif when != "waiting":
        pool.step()
    if when in ("handing_over", "closing"):
        while pool.step():
            pass
    if when == "closing":
        pool.abort("a")
    pool.abort("a")
    if plan is not None:
        pool.finish(plan)
    if when == "waiting":
        assert pool.closing == []
    else:
        assert pool.closing == [("a", 1)]
        assert pool.of(Released) == []
        pool.close("a", committed=False)
    assert pool.of(Released) == [Released("a", 1)]
    assert pool.step() is None
    assert_empty(pool)
    pool.abort("a")
    assert pool.of(Released) == [Released("a", 1)] * 2  # it is asked again, and told again


def test_a_closed_hand_off_in_the_middle_of_a_step_is_survived(
    make_pool: Callable, prompt: Callable
) -> None:
    pool = make_pool()
    pool.add(prompt("a", 60))
    plan = pool.scheduler.schedule(0.0)
    pool.close("a", committed=False)
    pool.finish(plan)
    assert [failed.code for failed in pool.of(RequestFailed)] == ["handoff_failed"]
    assert pool.of(Released) == [Released("a", 1)]
    assert pool.of(CacheUpdate) == []  # what it computed is not trusted
    assert_empty(pool)


def test_a_broken_hand_off_is_closed_and_told(make_pool: Callable, prompt: Callable) -> None:
    pool = make_pool()
    pool.add(prompt("a", 20))
    pool.step()
    for _ in range(2):
        broken = HandoffBroken("a", 1, "source", "the target is gone")
        pool.on_event(broken)
    [failed] = pool.of(RequestFailed)
    assert (failed.code, failed.message) == ("handoff_failed", "the target is gone")
    assert pool.closing == [("a", 1)]
    pool.close("a", committed=False)
    assert_empty(pool)


def test_duplicates_are_ignored_and_newer_attempts_take_over(
    make_pool: Callable, prompt: Callable
) -> None:
    pool = make_pool()
    pool.add(prompt("a", 20))
    pool.add(prompt("a", 20))
    assert pool.scheduler.load().num_waiting == 1
    pool.step()
    pool.add(prompt("a", 20, attempt=2))
    assert pool.closing == [("a", 1)]
    pool.step()
    pool.close("a", 1, committed=False)
    pool.close("a", 2)
    pool.add(prompt("a", 20, attempt=2))
    pool.add(prompt("a", 20, attempt=1))
    assert pool.step() is None
    assert pool.of(Released) == [Released("a", 1), Released("a", 2)]
    assert_empty(pool)


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        (SamplingParams(max_tokens=1), FinishReason.LENGTH),
        (SamplingParams(max_tokens=5, stop_token_ids=(9,)), FinishReason.STOP),
        (SamplingParams(max_tokens=5, stop_token_ids=(9,), min_tokens=2), None),
        (SamplingParams(max_tokens=5), None),
    ],
)
def test_a_first_token_may_be_the_last(
    make_pool: Callable, prompt: Callable, sampling: SamplingParams, reason: FinishReason | None
) -> None:
    pool = make_pool()
    pool.add(prompt("a", 20, sampling=sampling))
    pool.step()
    [first] = pool.of(FirstToken)
    assert first.finish_reason == reason
    assert ("a", 1) in pool.commits  # the KV goes over all the same


def test_penalties_get_the_prompt_with_the_last_chunk(
    make_pool: Callable, prompt: Callable
) -> None:
    pool = make_pool()
    pool.add(prompt("a", 60, sampling=SamplingParams(max_tokens=2, repetition_penalty=1.2)))
    [first], [last] = pool.step().work, pool.step().work
    assert first.prompt_token_ids == () and len(last.prompt_token_ids) == 60


# -- attempts and aborts ---------------------------------------------------------------------------


def _attempt(message: Prefill, num_output_tokens: int, **sampling: object) -> Prefill:
    return msgspec.structs.replace(
        message,
        attempt=2,
        num_output_tokens=num_output_tokens,
        sampling=SamplingParams(**{"max_tokens": 8, **sampling}),  # type: ignore[arg-type]
    )


def test_the_next_attempt_samples_the_token_after_those_that_the_caller_has(
    make_pool: Callable, prompt: Callable
) -> None:
    pool = make_pool()
    pool.add(_attempt(prompt("a", 20), 3, presence_penalty=1.0))
    plan = pool.step()
    [work] = plan.work
    assert (work.num_output_tokens, len(work.prompt_token_ids)) == (3, 20)
    [first] = pool.of(FirstToken)
    assert (first.index, first.finish_reason) == (3, None)


@pytest.mark.parametrize(
    ("num_output_tokens", "sampling", "finish_reason"),
    [
        (6, {}, None),
        (7, {}, FinishReason.LENGTH),
        (1, {"stop_token_ids": (9,), "min_tokens": 2}, None),
        (2, {"stop_token_ids": (9,), "min_tokens": 2}, FinishReason.STOP),
    ],
)
def test_the_end_counts_the_tokens_of_all_attempts(
    make_pool: Callable,
    prompt: Callable,
    num_output_tokens: int,
    sampling: dict[str, object],
    finish_reason: FinishReason | None,
) -> None:
    pool = make_pool()
    pool.add(_attempt(prompt("a", 20), num_output_tokens, **sampling))
    pool.step()
    [first] = pool.of(FirstToken)
    assert first.finish_reason is finish_reason


def test_asked_how_it_stands(make_pool: Callable, prompt: Callable) -> None:
    pool = make_pool(chunk_tokens=8)

    def ask(request_id: str) -> list[object]:
        pool.messages.clear()
        pool.on_event(ControlReceived(Ask(request_id, 1)))
        return pool.messages

    pool.add(prompt("a", 40))
    assert ask("a") == []
    pool.step()
    assert ask("a") == [Progress("a", 1, 8, 40)]
    while ("a", 1) not in pool.commits:
        pool.step()
    assert ask("a") == [Progress("a", 1, 40, 40)]
    pool.close("a")
    assert ask("a") == [Released("a", 1)]
    assert ask("b") == [Released("b", 1)]


def _waiting(pool: Any, prompt: Callable) -> None:
    pool.add(prompt("a", 60))


def _running(pool: Any, prompt: Callable) -> None:
    _waiting(pool, prompt)
    pool.step()


def _handing_over(pool: Any, prompt: Callable) -> None:
    _waiting(pool, prompt)
    while ("a", 1) not in pool.commits:
        pool.step()


def _fetching(pool: Any, prompt: Callable) -> None:
    pool.add(prompt("a", 60, num_target_tokens=16))
    assert pool.step() is None


def _returning(pool: Any, prompt: Callable) -> None:
    _fetching(pool, prompt)
    pool.break_fetch("a")


def _closing(pool: Any, prompt: Callable) -> None:
    _running(pool, prompt)
    pool.on_event(HandoffBroken("a", 1, "source", "x"))


REACH = {
    RequestState.WAITING: _waiting,
    RequestState.FETCHING: _fetching,
    RequestState.RETURNING: _returning,
    RequestState.RUNNING: _running,
    RequestState.HANDING_OVER: _handing_over,
    RequestState.CLOSING: _closing,
}


def test_aborts_are_tried_in_every_state() -> None:
    assert set(REACH) == set(RequestState) - {RequestState.RELEASED}


@pytest.mark.parametrize("state", REACH)
def test_an_abort_frees_everything_by_the_next_chunk(
    make_pool: Callable, prompt: Callable, state: RequestState
) -> None:
    pool = make_pool(2, chunk_tokens=8, fetch_from=1)
    REACH[state](pool, prompt)
    [request] = pool.scheduler._requests.values()
    assert request.state is state
    pool.abort("a")
    pool.abort("a")
    assert pool.step() is None, "nothing more is computed for it"
    if pool.closing_fetch:
        assert not pool.of(Released), "a read may be in flight"
        pool.close_fetch("a")
    elif pool.closing:
        assert not pool.of(Released), "a read may be in flight"
        pool.close("a", committed=False)
    assert pool.of(Released)
    pool.scheduler.check()
    assert all(c.free + c.cached == c.total for c in pool.scheduler.load().blocks)


def test_what_nobody_waits_for_makes_no_step_longer(make_pool: Callable, prompt: Callable) -> None:
    pool = make_pool(1, step_target_s=10.0)  # a step has room for both
    background = prompt("background", 96, first=500)
    pool.add(msgspec.structs.replace(background, priority=1, chunk_tokens=8))
    assert [len(work.token_ids) for work in pool.step().work] == [8]
    pool.add(prompt("asked", 20))
    assert [work.request_id for work in pool.step().work] == ["asked"]
    assert [work.request_id for work in pool.step().work] == ["background"]


def test_what_nobody_waits_for_fills_ranks_that_would_wait(
    make_pool: Callable, prompt: Callable
) -> None:
    pool = make_pool(2, step_target_s=10.0, ring_from=1000)
    background = prompt("background", 96, first=500)
    pool.add(msgspec.structs.replace(background, priority=1, chunk_tokens=8))
    pool.add(prompt("asked", 20))
    first, second = pool.step().work
    assert (first.request_id, second.request_id) == ("asked", "background")
    assert set(first.ring).isdisjoint(second.ring) and len(second.token_ids) == 8


@pytest.mark.parametrize(("asked", "ring"), [(0, 1), (2, 2), (8, 1)])
def test_a_ring_of_the_size_that_was_asked_for(
    make_pool: Callable, prompt: Callable, asked: int, ring: int
) -> None:
    pool = make_pool(2, ring_from=1000)
    pool.add(msgspec.structs.replace(prompt("a", 40), ring_size=asked))
    assert len(pool.step().work[0].ring) == ring
