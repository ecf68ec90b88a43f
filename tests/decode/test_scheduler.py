"""The decode scheduler, step by step, in a cluster that lives in memory."""

from collections.abc import Callable
from typing import Any

import pytest

from decode.states import TABLE, SequenceState
from kvtransfer.events import ControlReceived
from protocol.request import FinishReason

MakeCluster = Callable[..., Any]


def prompt_of(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    return tuple((7 * position + seed) % 50 for position in range(num_tokens))


def test_life_of_a_remote_prefill(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(block_size=4)
    key = cluster.reserve("a", prompt_of(10), max_tokens=3)
    assert cluster.step() is None
    opened = cluster.opened[key]
    assert opened.first_logical == 0
    assert len(opened.blocks) == 3, "10 tokens; the slot of the next one is in the third block"
    assert cluster.pool.counts().in_flight == 3
    assert not cluster.tickets

    cluster.open(key)
    assert cluster.tickets == {key: 0}
    assert cluster.step() is None, "nothing may be decoded before the commit"

    cluster.commit(key)
    assert cluster.pool.counts().in_flight == 0
    plan = cluster.step()
    assert [len(new.block_ids) for new in plan.new] == [3]
    assert [(s.start, s.sample) for s in plan.sequences] == [(10, True)]
    plan = cluster.step()
    assert plan.new == ()
    assert cluster.finished == {key: FinishReason.LENGTH}
    assert len(cluster.outputs[key]) == 3
    plan = cluster.step()
    assert (plan.sequences, plan.dropped) == ((), (key,))
    assert [line for line in cluster.log if line != "CacheUpdate"] == [
        "open a", "Ticket a", "Committed a", "Tokens", "Tokens", "Released a",
    ]  # fmt: skip
    cluster.assert_empty()


def test_life_of_a_local_prefill(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(block_size=4, token_budget=8)
    key = cluster.reserve("a", prompt_of(19), max_tokens=2)
    cluster.step()
    cluster.open(key)
    cluster.compute_here(key)
    cluster.compute_here(key)
    assert cluster.closing == {key}
    assert cluster.step() is None, "bytes could still land"
    cluster.close(key)
    chunks = [cluster.step().sequences[0] for _ in range(4)]
    assert [(c.start, len(c.token_ids), c.sample) for c in chunks] == [
        (0, 8, False), (8, 8, False), (16, 3, True), (19, 1, True),
    ]  # fmt: skip
    assert cluster.outputs[key] and cluster.finished[key] is FinishReason.LENGTH
    cluster.step()
    cluster.assert_empty()


def test_compute_here_that_comes_with_the_reservation_opens_no_handoff(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster()
    key = cluster.reserve("a", prompt_of(5), max_tokens=1)
    cluster.compute_here(key)
    plan = cluster.step()
    assert len(plan.sequences[0].token_ids) == 5
    assert not cluster.opened and cluster.tickets == {key: 0}
    cluster.run()
    cluster.assert_empty()


def test_decoding_goes_first_and_chunks_end_on_blocks(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(num_blocks=64, block_size=4, token_budget=10)
    first = cluster.reserve("a", prompt_of(3), max_tokens=20)
    cluster.compute_here(first)
    cluster.step()
    second = cluster.reserve("b", prompt_of(30, seed=1), max_tokens=2)
    cluster.compute_here(second)
    plan = cluster.step()
    assert [(s.request_id, s.start, len(s.token_ids)) for s in plan.sequences] == [
        ("a", 3, 1), ("b", 0, 8),
    ]  # fmt: skip
    cluster.run()
    cluster.assert_empty()


def test_next_turn_finds_prompt_and_answer(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(block_size=4)
    first = cluster.reserve("a", prompt_of(10), max_tokens=6)
    cluster.step()
    cluster.open(first)
    cluster.commit(first)
    cluster.run()
    history = prompt_of(10) + tuple(cluster.outputs[first])
    # The KV of 15 tokens was computed: three full blocks.
    second = cluster.reserve("b", (*history, 1, 2, 3), max_tokens=2)
    cluster.step()
    assert cluster.opened[second].first_logical == 3
    cluster.open(second)
    assert cluster.tickets[second] == 12
    cluster.commit(second)
    cluster.run()
    # A prompt that is cached to its end leaves one block to compute.
    third = cluster.reserve("c", history[:12], max_tokens=2)
    cluster.compute_here(third)
    plan = cluster.step()
    assert plan.sequences[0].start == 8
    cluster.run()
    cluster.assert_empty()


def test_tenants_do_not_share(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    first = cluster.reserve("a", prompt_of(12), max_tokens=1)
    cluster.compute_here(first)
    cluster.run()
    hashes = set(cluster.cached_hashes)
    assert len(hashes) == 3
    message = cluster.requests[first]
    other = type(message)("b", 0, message.prompt_token_ids, message.sampling, cache_salt="other")
    cluster.requests["b", 0] = other
    cluster.scheduler.on_event(ControlReceived(other), 0.0)
    cluster.compute_here(("b", 0))
    cluster.run()
    assert cluster.tickets["b", 0] == 0
    assert len(cluster.cached_hashes - hashes) == 3


def test_finished_at_its_first_token_ends_in_silence(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    key = cluster.reserve("a", prompt_of(9), max_tokens=1)
    cluster.step()
    cluster.open(key)
    cluster.commit(key)
    assert cluster.log[-2:] == ["Released a", "CacheUpdate"]
    assert "Tokens" not in cluster.log
    assert len(cluster.cached_hashes) == 2, "its prompt stays to be found"
    cluster.assert_empty()


@pytest.mark.parametrize(("min_tokens", "length"), [(0, 1), (1, 2), (3, 4)])
def test_stop_token_ends_it_once_min_tokens_are_there(
    make_cluster: MakeCluster, min_tokens: int, length: int
) -> None:
    cluster = make_cluster()
    key = cluster.reserve(
        "a", prompt_of(9), max_tokens=9, min_tokens=min_tokens, stop_token_ids=tuple(range(50))
    )
    cluster.compute_here(key)
    cluster.run()
    assert (len(cluster.outputs[key]), cluster.finished[key]) == (length, FinishReason.STOP)
    cluster.assert_empty()


def test_max_model_len_ends_it(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(max_model_len=12)
    key = cluster.reserve("a", prompt_of(9), max_tokens=100)
    cluster.compute_here(key)
    cluster.run()
    assert (len(cluster.outputs[key]), cluster.finished[key]) == (3, FinishReason.LENGTH)
    cluster.assert_empty()


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(17, 1), (16, 2), (15, 3), (1, 100)])
def test_what_cannot_be_served_to_its_end_is_refused(
    make_cluster: MakeCluster, num_prompt: int, max_tokens: int
) -> None:
    cluster = make_cluster(num_blocks=4, block_size=4)
    key = cluster.reserve("a", prompt_of(num_prompt), max_tokens)
    assert cluster.failed == {key: "kv_capacity_exceeded"}
    assert cluster.log == ["RequestFailed a", "Released a"]
    cluster.assert_empty()


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(16, 1), (15, 2), (1, 16)])
def test_a_lone_sequence_may_fill_the_pool(
    make_cluster: MakeCluster, num_prompt: int, max_tokens: int
) -> None:
    cluster = make_cluster(num_blocks=4, block_size=4)
    key = cluster.reserve("a", prompt_of(num_prompt), max_tokens)
    cluster.compute_here(key)
    cluster.run()
    assert cluster.finished[key] is FinishReason.LENGTH
    assert len(cluster.outputs[key]) == max_tokens, "the last needs no slot"
    cluster.assert_empty()


def test_no_room_waits_in_the_order_of_arrival(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(num_blocks=8, block_size=4)
    keys = [cluster.reserve(name, prompt_of(15, seed), 1) for seed, name in enumerate("abc")]
    small = cluster.reserve("d", prompt_of(2, 9), max_tokens=1)
    cluster.step()
    assert list(cluster.opened) == keys[:1], "4 blocks, then 4 and a watermark"
    assert cluster.scheduler.load().num_waiting == 3
    cluster.abort(keys[1])
    cluster.step()
    assert small not in cluster.opened, "nobody overtakes"
    for key in (keys[0], keys[2], small):
        cluster.open(key)
        cluster.commit(key)
        cluster.step()
    cluster.run()
    cluster.assert_empty()


def test_newest_is_preempted_and_returns_with_its_kv(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(num_blocks=8, block_size=4, token_budget=32)
    for seed, name in enumerate("ab"):
        cluster.compute_here(cluster.reserve(name, prompt_of(8, seed), max_tokens=12))
    swaps = []
    while (plan := cluster.step()) is not None:
        swaps += [(swap.request_id, swap.out, len(swap.block_ids)) for swap in plan.swaps]
    assert swaps == [("b", True, 4), ("b", False, 4)]
    assert {len(output) for output in cluster.outputs.values()} == {12}
    assert cluster.scheduler.load().counters["preemptions_total"] == 1
    cluster.assert_empty()


def test_beyond_host_memory_kv_is_recomputed(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(num_blocks=8, block_size=4, token_budget=32, max_swapped_blocks=0)
    for seed, name in enumerate("ab"):
        cluster.compute_here(cluster.reserve(name, prompt_of(8, seed), max_tokens=12))
    cluster.run()
    assert {len(output) for output in cluster.outputs.values()} == {12}
    assert cluster.scheduler.load().counters["recomputed_tokens_total"] > 0
    cluster.assert_empty()


def test_preempted_one_that_is_aborted_leaves_nothing(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(num_blocks=8, block_size=4, token_budget=32)
    for seed, name in enumerate("ab"):
        cluster.compute_here(cluster.reserve(name, prompt_of(8, seed), max_tokens=12))
    while not cluster.step().swaps:
        pass
    cluster.abort(("b", 0))
    assert cluster.step().dropped == (("b", 0),)
    assert not cluster.rank.host
    cluster.run()
    cluster.assert_empty()


@pytest.mark.parametrize("num_aborts", [1, 3])
@pytest.mark.parametrize("state", ["queued", "opening", "reserved", "switching", "running"])
def test_abort_at_any_state_any_number_of_times(
    make_cluster: MakeCluster, state: str, num_aborts: int
) -> None:
    cluster = make_cluster()
    key = cluster.reserve("a", prompt_of(9), max_tokens=9)
    if state != "queued":
        cluster.step()
    if state in ("reserved", "running", "switching"):
        cluster.open(key)
    if state == "switching":
        cluster.compute_here(key)
    if state == "running":
        cluster.commit(key)
        cluster.step()
    for _ in range(num_aborts):
        cluster.abort(key)
    if state in ("opening", "reserved", "switching"):
        assert key not in cluster.num_released
        assert cluster.pool.counts().in_flight == 3, "bytes may land until the hand-off is closed"
        assert cluster.log.count("close a") == 1
        cluster.close(key)
        cluster.abort(key)
    cluster.run()
    assert cluster.num_released[key] >= 1
    cluster.assert_empty()


def test_commit_that_crosses_the_abort_ends_the_handoff(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    key = cluster.reserve("a", prompt_of(9), max_tokens=9)
    cluster.step()
    cluster.open(key)
    cluster.abort(key)
    cluster.commit(key)
    assert cluster.num_released == {key: 1}
    cluster.close(key)
    assert "Committed a" not in cluster.log
    assert len(cluster.cached_hashes) == 2, "what was committed stays to be found"
    cluster.assert_empty()


def test_broken_handoff_fails_the_request_and_is_closed(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    key = cluster.reserve("a", prompt_of(9), max_tokens=9)
    cluster.step()
    cluster.open(key)
    cluster.break_handoff(key)
    cluster.break_handoff(key)
    assert cluster.failed == {key: "handoff_failed"}
    assert key not in cluster.num_released
    cluster.close(key)
    assert cluster.num_released == {key: 1}
    cluster.assert_empty()


def test_tokens_reach_the_coordinator_before_the_release(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.compute_here(cluster.reserve("a", prompt_of(9), max_tokens=1))
    cluster.run()
    assert cluster.log.index("Tokens") < cluster.log.index("Released a")


def test_every_state_but_the_last_can_be_left() -> None:
    assert set(SequenceState) - {state for state, _ in TABLE} == {SequenceState.RELEASED}


# -- attempts --------------------------------------------------------------------------------------


def test_the_next_attempt_goes_on_after_the_tokens_that_the_caller_has(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster()
    whole = cluster.reserve("whole", prompt_of(9), max_tokens=8)
    cluster.compute_here(whole)
    cluster.run()
    first = cluster.reserve("a", prompt_of(9), max_tokens=8)
    cluster.compute_here(first)
    for _ in range(3):
        cluster.step()
    num_made = len(cluster.outputs[first])
    assert num_made == 3
    second = cluster.retry(first, num_made)
    cluster.compute_here(second)
    cluster.run()
    assert cluster.outputs[first] + cluster.outputs[second] == cluster.outputs[whole]
    assert cluster.finished[second] is FinishReason.LENGTH
    assert cluster.num_released[first] == 1, "the newer attempt ends the older one"
    cluster.assert_empty()


@pytest.mark.parametrize("num_earlier", [0, 1, 2, 3])
def test_min_and_max_tokens_count_all_attempts(make_cluster: MakeCluster, num_earlier: int) -> None:
    """Every token is a stop token: the sequence ends with the third generated one."""
    cluster = make_cluster()
    sampling = {"min_tokens": 2, "stop_token_ids": tuple(range(50))}
    first = cluster.reserve("a", prompt_of(9), max_tokens=9, **sampling)
    cluster.compute_here(first)
    while len(cluster.outputs.get(first, ())) < num_earlier:
        cluster.step()
    if num_earlier < 3:
        second = cluster.retry(first)
        cluster.compute_here(second)
        cluster.run()
        assert len(cluster.outputs[second]) == 3 - num_earlier
        assert cluster.finished[second] is FinishReason.STOP
    else:
        assert cluster.finished[first] is FinishReason.STOP


def test_max_model_len_counts_all_attempts(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(max_model_len=14)
    first = cluster.reserve("a", prompt_of(9), max_tokens=100)
    cluster.compute_here(first)
    cluster.step()
    cluster.step()
    second = cluster.retry(first)
    cluster.compute_here(second)
    cluster.run()
    assert len(cluster.outputs[first]) + len(cluster.outputs[second]) == 5


def test_an_attempt_may_fill_the_pool_as_the_one_before_it_might_have(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(num_blocks=4, block_size=4)
    first = cluster.reserve("a", prompt_of(15), max_tokens=2)
    cluster.compute_here(first)
    cluster.step()
    assert len(cluster.outputs[first]) == 1
    second = cluster.retry(first)  # 16 tokens in 16 slots
    cluster.compute_here(second)
    cluster.run()
    assert cluster.finished[second] is FinishReason.LENGTH
    assert len(cluster.outputs[second]) == 1
    cluster.assert_empty()


def test_what_arrived_before_the_source_died_is_found_by_the_next_attempt(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(block_size=4)
    first = cluster.reserve("a", prompt_of(23), max_tokens=3)
    cluster.step()
    cluster.open(first)
    cluster.break_handoff(first)
    assert cluster.failed == {first: "handoff_failed"}
    assert not cluster.cached_hashes, "bytes can still land"
    cluster.close(first, num_whole_blocks=3)
    assert cluster.num_released == {first: 1}
    assert len(cluster.cached_hashes) == 3
    second = cluster.retry(first)
    cluster.step()
    assert cluster.opened[second].first_logical == 3
    cluster.open(second)
    assert cluster.tickets[second] == 12
    cluster.fetch(second, 0, 3)  # the next prefill pool has nothing of it
    assert len(cluster.served[second].blocks) == 3
    cluster.end_serving(second, committed=True)
    cluster.commit(second)
    cluster.run()
    assert len(cluster.outputs[second]) == 3
    cluster.assert_empty()


def test_a_partial_last_block_is_never_kept(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(block_size=4)
    key = cluster.reserve("a", prompt_of(10), max_tokens=3)
    cluster.step()
    cluster.open(key)
    cluster.abort(key)
    cluster.close(key, num_whole_blocks=3)
    assert len(cluster.cached_hashes) == 2
    cluster.assert_empty()


def test_late_and_repeated_messages_of_an_ended_attempt(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    key = cluster.reserve("a", prompt_of(5), max_tokens=2)
    cluster.abort(key)
    message = cluster.requests[key]
    cluster.scheduler.on_event(ControlReceived(message), 0.0)
    assert cluster.step() is None, "it is not begun again"
    cluster.abort(key)
    assert cluster.num_released == {key: 2}
    # An abort that overtakes its request.
    late = type(message)("b", 1, message.prompt_token_ids, message.sampling)
    cluster.requests["b", 1] = late
    cluster.abort(("b", 1))
    cluster.scheduler.on_event(ControlReceived(late), 0.0)
    assert cluster.step() is None
    cluster.assert_empty()


def test_asked_how_it_stands(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    key = cluster.reserve("a", prompt_of(5), max_tokens=2)
    cluster.ask(key)
    assert cluster.log == [], "it waits for room"
    cluster.step()
    cluster.ask(key)
    cluster.open(key)
    cluster.ask(key)
    assert cluster.log == ["open a", "Ticket a", "Ticket a"]
    cluster.ask(("unknown", 1))
    assert cluster.log[-1] == "Released unknown"
    cluster.num_released.pop(("unknown", 1))
    cluster.commit(key)
    cluster.run()
    cluster.ask(key)
    assert cluster.log[-1] == "Released a"
    cluster.assert_empty()


ABORTS: dict[SequenceState, Callable[[Any], tuple[str, int]]] = {}


def _in_state(state: SequenceState) -> Callable[[Any], Any]:
    def keep(reach: Callable[[Any], tuple[str, int]]) -> Any:
        ABORTS[state] = reach
        return reach

    return keep


@_in_state(SequenceState.QUEUED)
def _queued(cluster: Any) -> tuple[str, int]:
    return cluster.reserve("a", prompt_of(9), max_tokens=5)


@_in_state(SequenceState.LOADING)
def _loading(cluster: Any) -> tuple[str, int]:
    key = cluster.reserve_stored("a", prompt_of(9), max_tokens=5, num_store_tokens=8)
    cluster.step()
    return key


@_in_state(SequenceState.OPENING)
def _opening(cluster: Any) -> tuple[str, int]:
    key = _queued(cluster)
    cluster.step()
    return key


@_in_state(SequenceState.RESERVED)
def _reserved(cluster: Any) -> tuple[str, int]:
    key = _opening(cluster)
    cluster.open(key)
    return key


@_in_state(SequenceState.SWITCHING)
def _switching(cluster: Any) -> tuple[str, int]:
    key = _reserved(cluster)
    cluster.compute_here(key)
    return key


@_in_state(SequenceState.RUNNING)
def _running(cluster: Any) -> tuple[str, int]:
    key = _reserved(cluster)
    cluster.commit(key)
    cluster.step()
    return key


@_in_state(SequenceState.PREEMPTED)
def _preempted(cluster: Any) -> tuple[str, int]:
    older = cluster.reserve("older", prompt_of(9, seed=1), max_tokens=28)
    cluster.compute_here(older)
    key = cluster.reserve("a", prompt_of(9), max_tokens=28)
    cluster.compute_here(key)
    for _ in range(60):
        cluster.step()
        if cluster.scheduler._sequences[key].state is SequenceState.PREEMPTED:
            break
    cluster.abort(older)
    cluster.num_released.pop(older)
    cluster.requests.pop(older)
    return key


@_in_state(SequenceState.CLOSING)
def _closing(cluster: Any) -> tuple[str, int]:
    key = _reserved(cluster)
    cluster.break_handoff(key)
    return key


def test_aborts_are_tried_in_every_state() -> None:
    assert set(ABORTS) == set(SequenceState) - {SequenceState.RELEASED}


@pytest.mark.parametrize("state", ABORTS)
def test_an_abort_frees_everything_by_the_next_step(
    make_cluster: MakeCluster, state: SequenceState
) -> None:
    cluster = make_cluster(num_blocks=9, block_size=4, watermark_blocks=0)
    key = ABORTS[state](cluster)
    assert cluster.scheduler._sequences[key].state is state
    cluster.abort(key)
    cluster.abort(key)
    for closing in sorted(cluster.closing):  # the request's own, or a piece of it
        assert key not in cluster.num_released, "bytes can still land"
        cluster.close(closing)
    assert cluster.num_released[key] >= 1
    cluster.step()  # every rank forgets it
    cluster.assert_empty()
