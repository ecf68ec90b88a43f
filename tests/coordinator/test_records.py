"""One sequence's record: every order of arrival gives the same tokens, and its table is closed."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.config import CoordinatorConfig, ExpectedPool
from coordinator.records.paths import describe_path
from coordinator.records.records import TABLE, Record, RecordEvent, RecordState, as_new_token
from coordinator.requests.overdue import overdue, pools_to_ask
from protocol.errors import IllegalTransition
from protocol.messages import FirstToken, NewToken
from protocol.request import FinishReason, PrefillPath, SamplingParams
from protocol.token_ids import TokenIds


def record(max_tokens: int = 8) -> Record:
    return Record("r", 1, TokenIds.of((1, 2, 3)), SamplingParams(max_tokens=max_tokens), "tenant")


@given(st.permutations(range(8)), st.lists(st.integers(0, 7)))
def test_any_order_with_duplicates(order: list[int], repeats: list[int]) -> None:
    mine, taken = record(), []
    for index in [*order[:4], *repeats, *order]:
        finish = FinishReason.LENGTH if index == 7 else None
        taken += mine.accept(NewToken("r", 1, index, 100 + index, finish))
    assert [token.index for token in taken] == list(range(8))
    assert mine.output_token_ids == [100 + i for i in range(8)]
    assert mine.finish_reason is FinishReason.LENGTH


def test_nothing_is_accepted_after_the_end() -> None:
    mine = record()
    assert mine.accept(NewToken("r", 1, 0, 5, FinishReason.STOP))
    assert not mine.accept(NewToken("r", 1, 1, 6))
    mine = record()
    mine.advance(RecordEvent.END)
    assert not mine.accept(NewToken("r", 1, 0, 5))


@pytest.mark.parametrize(("state", "step"), list(itertools.product(RecordState, RecordEvent)))
def test_the_table_is_closed(state: RecordState, step: RecordEvent) -> None:
    mine = record()
    mine.state = state
    if (state, step) in TABLE:
        mine.advance(step)
        assert mine.state is TABLE[state, step]
    else:
        with pytest.raises(IllegalTransition):
            mine.advance(step)
        assert mine.state is state


def test_every_state_leads_to_gone() -> None:
    for start in RecordState:
        reached, frontier = {start}, [start]
        while frontier:
            state = frontier.pop()
            new = {after for (before, _), after in TABLE.items() if before is state} - reached
            reached |= new
            frontier += new
        assert RecordState.GONE in reached


def test_paths_and_pending_work() -> None:
    mine = record()
    mine.decode_pool = "decode0"
    assert describe_path(mine) == "decode=decode0"
    assert (mine.pending_prefill_tokens, mine.pending_decode_tokens) == (3, 8)
    mine.num_target_cached_tokens = 2
    assert describe_path(mine) == "decode=decode0; local; cached=2; computed=1"
    assert mine.pending_prefill_tokens == 1
    mine.prefill_pool = "prefill0"
    mine.num_prefilled_tokens = 3
    assert mine.pending_prefill_tokens == 0
    assert describe_path(mine) == "decode=decode0; prefill=prefill0"
    path = PrefillPath("prefill0", 4, 1, 1, 2, 1)
    mine.path = path
    assert describe_path(mine).endswith("ring=4; cached=1; computed=2; moved=1")
    first = as_new_token(FirstToken("r", 1, 7, path))
    assert mine.accept(first) == [first]
    mine.advance(RecordEvent.END)
    mine.forget_tokens()
    assert (mine.num_prompt_tokens, len(mine.prompt_token_ids)) == (3, 0)
    assert (mine.pending_prefill_tokens, mine.pending_decode_tokens) == (0, 0)


def test_an_attempt_after_tokens_that_the_caller_has() -> None:
    mine = record()
    mine.advance(RecordEvent.RESERVE)
    mine.decode_pool, mine.num_target_cached_tokens = "decode0", 1
    mine.advance(RecordEvent.COMPUTE_HERE)
    mine.advance(RecordEvent.TOKEN)
    mine.accept(NewToken("r", 1, 0, 10))
    mine.accept(NewToken("r", 1, 2, 12))
    mine.lose_attempt("worker_lost")
    assert (mine.state, mine.attempt) == (RecordState.WAITING, 2)
    assert not mine.has_gap, "what had come early may come otherwise now"
    reserve = mine.reserve()
    assert (reserve.attempt, reserve.prompt_token_ids) == (2, (1, 2, 3, 10))
    assert reserve.num_output_tokens == 1
    assert mine.num_computed_tokens == 2, "as far as its caller is concerned"
    mine.advance(RecordEvent.RESERVE)
    mine.decode_pool, mine.num_target_cached_tokens = "decode1", 0
    assert (mine.num_attempt_tokens, mine.pending_prefill_tokens) == (4, 4)
    mine.prefill_pool = "prefill0"
    prefill = mine.prefill(7)
    assert (prefill.num_output_tokens, prefill.prompt_token_ids) == (1, (1, 2, 3, 10))
    path = PrefillPath("prefill0", 1, 1, 0, 4, 4)
    first = as_new_token(FirstToken("r", 2, 11, path, index=1))
    assert mine.accept(first) == [first]
    assert describe_path(mine).endswith("; attempts=2; lost=worker_lost")
    assert mine.lost[0].num_output_tokens == 1


def test_what_is_overdue() -> None:
    config = CoordinatorConfig("t", "arithmetic", (ExpectedPool("d", "decode", 1, 1),))
    mine = record()
    mine.advance(RecordEvent.RESERVE)
    mine.decode_pool = "d"
    mine.holders = {("d", 1)}
    assert overdue(mine, config, 100.0) is None
    assert pools_to_ask(mine, config, 100.0) == ["d"]
    assert pools_to_ask(mine, config, 101.0) == [], "once in a while"
    mine.accept(NewToken("r", 1, 1, 5))  # token 0 is lost
    assert overdue(mine, config, 100.0) is None
    assert overdue(mine, config, 104.0) is None
    error = overdue(mine, config, 106.0)
    assert error is not None and error.code == "stalled"
    mine.accept(NewToken("r", 1, 0, 5))
    assert overdue(mine, config, 107.0) is None
    mine.holders.clear()  # released, and no last token
    overdue(mine, config, 108.0)
    assert overdue(mine, config, 114.0) is not None
