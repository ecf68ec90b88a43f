"""One sequence's request: every order of arrival gives the same tokens, and its table is closed."""

from hypothesis import given
from hypothesis import strategies as st

from coordinator.config import CoordinatorConfig, ExpectedPool
from coordinator.request import (
    Request,
    RequestEvent,
    RequestState,
    as_new_token,
)
from coordinator.requests.failover import overdue, pools_to_ask
from protocol.messages import FirstToken, NewToken
from protocol.request import FinishReason, PrefillPath, SamplingParams
from protocol.token_ids import TokenIds


def request(max_tokens: int = 8) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=TokenIds.of((1, 2, 3)),
        sampling=SamplingParams(max_tokens=max_tokens),
        tenant="tenant",
    )


@given(st.permutations(range(8)), st.lists(st.integers(0, 7)))
def test_any_order_with_duplicates(order: list[int], repeats: list[int]) -> None:
    mine, taken = request(), []
    for index in [*order[:4], *repeats, *order]:
        finish = FinishReason.LENGTH if index == 7 else None
        taken += mine.accept(NewToken("r", 1, index, 100 + index, finish))
    assert [token.index for token in taken] == list(range(8))
    assert mine.output_token_ids == [100 + i for i in range(8)]
    assert mine.finish_reason is FinishReason.LENGTH


def test_nothing_is_accepted_after_the_end() -> None:
    mine = request()
    assert mine.accept(NewToken("r", 1, 0, 5, FinishReason.STOP))
    assert not mine.accept(NewToken("r", 1, 1, 6))
    mine = request()
    mine.advance(RequestEvent.END)
    assert not mine.accept(NewToken("r", 1, 0, 5))


def test_paths_and_pending_work() -> None:
    mine = request()
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
    mine.advance(RequestEvent.END)
    mine.forget_tokens()
    assert (mine.num_prompt_tokens, len(mine.prompt_token_ids)) == (3, 0)
    assert (mine.pending_prefill_tokens, mine.pending_decode_tokens) == (0, 0)


def test_an_attempt_after_tokens_that_the_caller_has() -> None:
    mine = request()
    mine.advance(RequestEvent.RESERVE)
    mine.decode_pool, mine.num_target_cached_tokens = "decode0", 1
    mine.advance(RequestEvent.COMPUTE_HERE)
    mine.advance(RequestEvent.TOKEN)
    mine.accept(NewToken("r", 1, 0, 10))
    mine.accept(NewToken("r", 1, 2, 12))
    mine.lose_attempt("worker_lost")
    assert (mine.state, mine.attempt) == (RequestState.WAITING, 2)
    assert not mine.has_gap, "what had come early may come otherwise now"
    reserve = mine.reserve()
    assert (reserve.attempt, reserve.prompt_token_ids) == (2, (1, 2, 3, 10))
    assert reserve.num_output_tokens == 1
    assert mine.num_computed_tokens == 2, "as far as its caller is concerned"
    mine.advance(RequestEvent.RESERVE)
    mine.decode_pool, mine.num_target_cached_tokens = "decode1", 0
    assert (mine.num_attempt_tokens, mine.pending_prefill_tokens) == (4, 4)
    mine.prefill_pool = "prefill0"
    prefill = mine.prefill(7)
    assert (prefill.num_output_tokens, prefill.prompt_token_ids) == (1, (1, 2, 3, 10))
    path = PrefillPath("prefill0", 1, 1, 0, 4, 4)
    first = as_new_token(FirstToken("r", 2, 11, path, index=1))
    assert mine.accept(first) == [first]
    assert mine.describe_path().endswith("; attempts=2; lost=worker_lost")
    assert mine.lost[0].num_output_tokens == 1


def test_what_is_overdue() -> None:
    config = CoordinatorConfig("t", "arithmetic", (ExpectedPool("d", "decode", 1, 1),))
    mine = request()
    mine.advance(RequestEvent.RESERVE)
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
