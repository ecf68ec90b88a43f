"""Sampling: what each parameter means, and that a token depends on its own row alone."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.sampling import (
    Sampled,
    SamplingRow,
    is_finite,
    needs_history,
    philox,
    uniform,
)
from modeling.sampling import sample as sample_rows
from protocol.request import NoToken, SamplingParams
from tests.sizes import some_of

ALL_ONES = 0xFFFFFFFF
SMALL_MODEL = [2.0, 1.5, 1.0, 0.5, 0.0, -1.0, -2.0, -3.0]


def make_row(
    *, index: int = 0, prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), **fields: object
) -> SamplingRow:
    params = SamplingParams(max_tokens=100, **fields)  # type: ignore[arg-type]
    return SamplingRow(params, index, prompt, output)


def sample(logits_BV: torch.Tensor, rows: list[SamplingRow]) -> list[Sampled]:
    """The tokens of rows of which each must have one."""
    sampled = sample_rows(logits_BV, rows)
    assert all(isinstance(row, tuple) for row in sampled), sampled
    return [row for row in sampled if isinstance(row, tuple)]


def draw(logits: list[float], count: int = 1, **fields: Any) -> list[int]:
    """The tokens at indices 0, 1, ... of one sequence, all from the same logits."""
    rows = [make_row(index=i, **fields) for i in range(count)]
    return [token for token, _ in sample(torch.tensor([logits] * count), rows)]


def greedy(logits: list[float], **fields: Any) -> int:
    return draw(logits, temperature=0.0, **fields)[0]


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], want: tuple[int, int, int, int]
) -> None:
    """The vectors published with Random123."""
    assert philox(counter, key) == want


def test_uniform_is_a_pure_function_of_seed_and_index() -> None:
    values = [uniform(seed, index) for seed in (0, 1, 2**63) for index in range(100)]
    assert len(set(values)) == 300
    assert all(0.0 <= value < 1.0 for value in values)
    assert abs(sum(values) / 300 - 0.5) < 0.06


def test_the_distribution_is_softmax() -> None:
    count = 4000
    tokens = draw(SMALL_MODEL, count, seed=11, temperature=0.8)
    want = (torch.tensor(SMALL_MODEL) / 0.8).softmax(-1) * count
    got = torch.bincount(torch.tensor(tokens), minlength=len(SMALL_MODEL))
    chi_square = float(((got - want) ** 2 / want).sum())
    assert chi_square < 24.3  # 7 degrees of freedom: exceeded once in 1000 seeds


def test_equal_seeds_give_equal_tokens_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 50, generator=generator)
    fields = [
        {"seed": i, "temperature": i % 4 * 0.5, "top_k": i % 3 * 10, "top_p": 1 - i % 2 * 0.2}
        for i in range(20)
    ]
    rows = [make_row(index=i % 7, **f) for i, f in enumerate(fields)]  # type: ignore[arg-type]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(20)]
    assert together == sample(logits, rows)


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert greedy([0.0, 3.0, 3.0, 1.0]) == 1
    tied = torch.zeros(3, 1000)
    assert [token for token, _ in sample(tied, [make_row(temperature=0.0)] * 3)] == [0, 0, 0]


def test_top_k_keeps_the_best() -> None:
    assert set(draw(SMALL_MODEL, 300, temperature=5.0, top_k=3)) == {0, 1, 2}
    assert set(draw(SMALL_MODEL, 50, temperature=5.0, top_k=1)) == {0}
    assert set(draw([1.0, 1.0, 1.0, 0.0], 200, temperature=5.0, top_k=2)) == {0, 1, 2}, "ties stay"


def test_top_p_keeps_the_smallest_set_with_that_mass() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert set(draw(logits, 300, top_p=0.4)) == {0}
    assert set(draw(logits, 300, top_p=0.75)) == {0, 1}
    assert set(draw(logits, 300, top_p=0.81)) == {0, 1, 2}
    # After top_k=2 the first has 0.625 of what is left.
    assert set(draw(logits, 300, top_k=2, top_p=0.6)) == {0}


def test_top_p_over_more_tokens_than_are_looked_at_first() -> None:
    tokens = draw([0.0] * 3000 + [-50.0] * 500, 300, top_p=0.999999)
    assert max(tokens) < 3000 and len(set(tokens)) > 200


def test_min_p_is_relative_to_the_best() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert set(draw(logits, 300, min_p=0.5)) == {0, 1}
    assert set(draw(logits, 300, min_p=1.0)) == {0}


def test_logit_bias() -> None:
    assert greedy(SMALL_MODEL, logit_bias={7: 100.0}) == 7
    assert 0 not in draw(SMALL_MODEL, 200, logit_bias={0: -100.0})


def test_min_tokens_bans_stop_tokens_until_then() -> None:
    rows = [
        make_row(index=i, temperature=0.0, min_tokens=2, stop_token_ids=(0, 1)) for i in range(4)
    ]
    tokens = [token for token, _ in sample(torch.tensor([SMALL_MODEL] * 4), rows)]
    assert tokens == [2, 2, 0, 0]


def greedy_of(logits: list[float], row: SamplingRow) -> int:
    return sample(torch.tensor([logits]), [row])[0][0]


def test_repetition_penalty_counts_prompt_and_output() -> None:
    logits = [2.0, 1.5, -1.0, 0.1]
    in_prompt = make_row(temperature=0.0, repetition_penalty=3.0, prompt=(0,))
    assert greedy_of(logits, in_prompt) == 1
    in_both = make_row(temperature=0.0, repetition_penalty=3.0, prompt=(0,), output=(0, 1))
    assert greedy_of(logits, in_both) == 0, "0.67 and 0.5"
    assert greedy_of([-1.0, -2.0, -9.0], in_prompt) == 1, "-3 and -2"


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = [2.0, 1.5, 1.2]
    kept = make_row(temperature=0.0, presence_penalty=1.0, prompt=(0, 0, 0))
    assert greedy_of(logits, kept) == 0
    once = make_row(temperature=0.0, presence_penalty=0.6, output=(0, 0, 0))
    assert greedy_of(logits, once) == 1
    thrice = make_row(temperature=0.0, frequency_penalty=0.2, output=(0, 0, 0))
    assert greedy_of(logits, thrice) == 1
    twice = make_row(temperature=0.0, frequency_penalty=0.2, output=(0, 0))
    assert greedy_of(logits, twice) == 0


def test_logprobs_come_before_temperature_and_truncation() -> None:
    row = make_row(temperature=3.0, top_k=1, num_logprobs=3)
    [(token, logprobs)] = sample(torch.tensor([SMALL_MODEL]), [row])
    want = torch.tensor(SMALL_MODEL).log_softmax(-1)
    assert token == 0 and logprobs is not None
    assert logprobs.chosen == pytest.approx(float(want[0]))
    assert logprobs.top_ids == (0, 1, 2)
    assert logprobs.top == pytest.approx(want[:3].tolist())


def test_logprobs_come_after_penalties() -> None:
    row = make_row(temperature=0.0, num_logprobs=8, logit_bias={1: -4.0}, min_tokens=1,
                   stop_token_ids=(0,))  # fmt: skip
    [(token, logprobs)] = sample(torch.tensor([SMALL_MODEL]), [row])
    assert token == 2 and logprobs is not None
    assert logprobs.top_ids == (2, 3, 4, 5, 6, 1, 7), "a banned token has no rank"
    assert sum(map(math.exp, logprobs.top)) == pytest.approx(1.0)


def test_logprobs_of_the_chosen_token_alone() -> None:
    row = make_row(temperature=0.0, num_logprobs=0)
    [(_, logprobs)] = sample(torch.tensor([SMALL_MODEL]), [row])
    assert logprobs is not None and logprobs.top == ()


def test_the_logits_are_left_as_they_are() -> None:
    logits = torch.tensor([SMALL_MODEL])
    sample(logits, [make_row(logit_bias={0: 5.0}, repetition_penalty=2.0, output=(1,))])
    assert logits.tolist() == [SMALL_MODEL]


BAD = (math.nan, math.inf)
SPOILED = st.sampled_from([*BAD, "all masked"])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("at", [0, 31, 5_000, 150_000, 151_935])
def test_one_number_that_is_not_finite_among_a_whole_vocabulary_is_found(
    bad: float, at: int
) -> None:
    logits = torch.zeros(2, 151_936)
    logits[0, at] = bad
    for fields in ({"temperature": 0.0}, {"temperature": 1.0}, {"num_logprobs": 2}):
        row = make_row(**fields)
        spoiled, sound = sample_rows(logits, [row, row])
        assert spoiled is NoToken.NON_FINITE and isinstance(sound, tuple)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 1.0])), min_size=1, max_size=6),
    SPOILED,
    st.integers(0, len(SMALL_MODEL) - 1),
)
def test_a_spoiled_row_ends_alone(
    rows: list[tuple[bool, float]], how: float | str, at: int
) -> None:
    logits = torch.tensor([SMALL_MODEL] * len(rows))
    params = [make_row(temperature=temperature, num_logprobs=1) for _, temperature in rows]
    sound = sample_rows(logits, params)
    for i, (is_spoiled, _) in enumerate(rows):
        if is_spoiled and isinstance(how, float):
            logits[i, at] = how
        elif is_spoiled:
            logits[i] = -math.inf
    got = sample_rows(logits, params)
    for (is_spoiled, _), mine, before in zip(rows, got, sound, strict=True):
        assert mine == (NoToken.NON_FINITE if is_spoiled else before)


def test_a_model_may_mask_tokens_of_its_own() -> None:
    logits = [*SMALL_MODEL[:3], *[-math.inf] * 5]
    assert greedy(logits) == 0
    assert set(draw(logits, 300, temperature=5.0)) == {0, 1, 2}


@pytest.mark.parametrize(
    "fields",
    [
        {"min_tokens": 1, "stop_token_ids": tuple(range(8))},
        {"logit_bias": dict.fromkeys(range(8), -math.inf)},
        {"logit_bias": {3: math.inf}},
        {"repetition_penalty": 1e-45, "output": (0,)},
        {"repetition_penalty": 1e-45, "prompt": (0,)},
    ],
)
def test_a_request_that_leaves_no_token_is_told_from_broken_numbers(
    fields: dict[str, Any],
) -> None:
    row = make_row(**fields)
    spoiled = torch.tensor([[math.nan] * 8])
    assert sample_rows(torch.tensor([SMALL_MODEL]), [row]) == [NoToken.NOTHING_LEFT]
    assert sample_rows(spoiled, [row]) == [NoToken.NON_FINITE], "the rank's fault comes first"


@pytest.mark.parametrize("temperature", [1e-10, 1e-40, 1e-320, 5e-324])
def test_the_limit_of_a_small_temperature_is_greedy(temperature: float) -> None:
    assert set(draw(SMALL_MODEL, 20, temperature=temperature, top_p=0.9, top_k=4)) == {0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [*BAD, -math.inf])
def test_hidden_states_that_are_not_finite_are_seen(dtype: torch.dtype, bad: float) -> None:
    hidden = torch.full((65, 129), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(hidden) and is_finite(hidden[:0])
    for at in ((0, 0), (64, 128), (31, 77)):
        spoiled = hidden.clone()
        spoiled[at] = bad
        assert not is_finite(spoiled)


@settings(max_examples=some_of(200))
@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30),
    seed=st.integers(0, 2**64 - 1),
    temperature=st.floats(0.01, 5.0),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_the_best_token_is_always_possible(
    logits: list[float], seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    fields = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    [token] = draw(logits, seed=seed, **fields)  # type: ignore[arg-type]
    assert 0 <= token < len(logits)
    if top_k == 1 and len(set(logits)) == len(logits):
        assert token == max(range(len(logits)), key=logits.__getitem__)


def test_who_needs_history() -> None:
    assert not needs_history(SamplingParams(max_tokens=1, logit_bias={1: 2.0}))
    assert needs_history(SamplingParams(max_tokens=1, frequency_penalty=-0.1))
    assert needs_history(SamplingParams(max_tokens=1, repetition_penalty=1.1))
