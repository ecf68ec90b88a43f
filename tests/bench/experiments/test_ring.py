"""Rings: none where none can help, exact where links are free, and they give way under load."""

import pytest

from bench.simulate.ring import ALWAYS, NEVER, alone, null_cases, with_link
from bench.simulate.step_time import MEASURED, ROOFLINE


def test_short_prompts_and_free_links_have_no_crossover() -> None:
    for null in null_cases():
        assert null.holds, null


def test_a_long_prompt_rings_and_gains() -> None:
    single = alone(MEASURED, 4, NEVER, 16_384)
    ringed = alone(MEASURED, 4, None, 16_384)
    assert (single.ring_size, ringed.ring_size) == (1, 4)
    assert 2 < single.ttft_s / ringed.ttft_s < 4


@pytest.mark.parametrize("slower", [1, 1000])
def test_slow_links_make_a_forced_ring_lose(slower: int) -> None:
    steps = with_link(ROOFLINE, slower)
    gain = alone(steps, 2, NEVER, 4096).ttft_s / alone(steps, 2, ALWAYS, 4096).ttft_s
    assert (gain > 1) is (slower == 1)
    assert alone(steps, 2, None, 4096).ring_size == (2 if slower == 1 else 1)
