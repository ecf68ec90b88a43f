"""One sequence's record: every order of arrival gives the same tokens, and its table is closed."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.records import TABLE, Record, State, Step, as_new_token
from protocol.errors import IllegalTransition
from protocol.messages import FirstToken, NewToken
from protocol.request import FinishReason, PrefillPath, SamplingParams


def record(max_tokens: int = 8) -> Record:
    return Record("r", 1, (1, 2, 3), SamplingParams(max_tokens=max_tokens), "tenant")


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
    mine.step(Step.END)
    assert not mine.accept(NewToken("r", 1, 0, 5))


@pytest.mark.parametrize(("state", "step"), list(itertools.product(State, Step)))
def test_the_table_is_closed(state: State, step: Step) -> None:
    mine = record()
    mine.state = state
    if (state, step) in TABLE:
        mine.step(step)
        assert mine.state is TABLE[state, step]
    else:
        with pytest.raises(IllegalTransition):
            mine.step(step)
        assert mine.state is state


def test_every_state_leads_to_gone() -> None:
    for start in State:
        reached, frontier = {start}, [start]
        while frontier:
            state = frontier.pop()
            new = {after for (before, _), after in TABLE.items() if before is state} - reached
            reached |= new
            frontier += new
        assert State.GONE in reached


def test_paths_and_pending_work() -> None:
    mine = record()
    mine.decode_pool = "decode0"
    assert mine.describe_path() == "decode=decode0"
    assert (mine.pending_prefill_tokens, mine.pending_decode_tokens) == (3, 8)
    mine.num_target_cached_tokens = 2
    assert mine.describe_path() == "decode=decode0; local; cached=2; computed=1"
    assert mine.pending_prefill_tokens == 1
    mine.prefill_pool = "prefill0"
    mine.num_prefilled_tokens = 3
    assert mine.pending_prefill_tokens == 0
    assert mine.describe_path() == "decode=decode0; prefill=prefill0"
    path = PrefillPath("prefill0", 4, 1, 1, 2, 1)
    mine.path = path
    assert mine.describe_path().endswith("ring=4; cached=1; computed=2; moved=1")
    first = as_new_token(FirstToken("r", 1, 7, path))
    assert mine.accept(first) == [first]
    mine.step(Step.END)
    mine.forget_prompt()
    assert (mine.num_prompt_tokens, mine.prompt_token_ids) == (3, ())
    assert (mine.pending_prefill_tokens, mine.pending_decode_tokens) == (0, 0)
