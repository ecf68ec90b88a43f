"""The judge of streams tells lost, repeated and foreign tokens apart and overlooks none."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.campaign.oracle import MAX_TOKENS, Oracle
from tests.campaign.tally import Tally, first_lie, percentile

RIGHT = [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize(
    ("tokens", "lie"),
    [
        (RIGHT, None),
        (RIGHT[:3], None),
        ([], None),
        ([5, 6, 8, 9, 10], ("lost", 2)),
        ([6, 7, 8], ("lost", 0)),
        ([5, 6, 6, 7, 8], ("repeated", 2)),
        ([5, 6, 7, 7], ("repeated", 3)),
        ([5, 6, 99, 8], ("foreign", 2)),
        ([99], ("foreign", 0)),
        ([*RIGHT, 10], ("repeated", 6)),
    ],
)
def test_lies(tokens: list[int], lie: tuple[str, int] | None) -> None:
    assert first_lie(tokens, RIGHT) == lie
    tally = Tally()
    tally.compare("r", tokens, RIGHT)
    assert tally.lies.total() == (lie is not None)
    assert bool(tally.problems) == (lie is not None)


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_only_a_beginning_is_true(tokens: list[int], expected: list[int]) -> None:
    assert (first_lie(tokens, expected) is None) == (tokens == expected[: len(tokens)])


def test_tallies_add_up() -> None:
    one, other = Tally(), Tally()
    one.ends["done"] = 2
    other.ends.update(done=1, refused=4)
    other.detected("SIGKILL decode", 0.5)
    other.num_tokens = 7
    other.problem("something")
    one.add(other)
    assert (one.num_requests, one.num_tokens, one.problems) == (3, 7, ["something"])
    assert one.detect_s == {"SIGKILL decode": [0.5]}


def test_percentiles() -> None:
    assert percentile([], 0.99) == 0.0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(n) for n in range(100)], 0.99) == 99.0


def test_the_oracle_is_its_seeds_alone() -> None:
    draws = [Oracle(random.Random(3), [1, 9]).draw(random.Random(4)) for _ in range(2)]
    assert draws[0] == draws[1]
    assert len(draws[0].tokens) == MAX_TOKENS
