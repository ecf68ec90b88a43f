"""Ratios of two targets: what is known of made-up records is what the intervals hold."""

import math
from random import Random

import msgspec
import pytest

from bench.load.analysis.compare import Pair, Row, Settings, compare, conclude, judge, parse_gate
from bench.load.analysis.slo import Deadline, Objective, Slo
from bench.load.record import RequestRecord
from protocol.errors import ConfigError
from tests.bench.records import record

NUM_PER_BLOCK = 60
FEW = Settings(num_draws=200)


def _record(target: str, index: int, ttft_s: float, outcome: str = "ok") -> RequestRecord:
    told = ttft_s if outcome == "ok" else None
    return record(
        index, told, gaps_s=(0.01, 0.01), target=target, outcome=outcome, finished_s=ttft_s + 0.02
    )


def _both(seed: int, ratio: float, num_blocks: int = 8) -> list[RequestRecord]:
    """Pairs with a true ratio; blocks differ from each other, and so does every request."""
    random = Random(seed)
    records = []
    for block in range(num_blocks):
        slow = random.lognormvariate(0.0, 0.3)
        for number in range(NUM_PER_BLOCK):
            index = block * NUM_PER_BLOCK + number
            own = slow * random.lognormvariate(-2.0, 0.5)
            records.append(_record("a", index, own * random.lognormvariate(0.0, 0.2)))
            records.append(_record("b", index, ratio * own * random.lognormvariate(0.0, 0.2)))
    return records


def _starts(num_blocks: int = 8) -> list[int]:
    return [NUM_PER_BLOCK * block for block in range(num_blocks)]


def _row(pair: Pair, metric: str, statistic: str) -> Row:
    return next(row for row in pair.rows if (row.metric, row.statistic) == (metric, statistic))


def test_intervals_hold_the_true_ratio() -> None:
    ratio = 1.3
    num_held = dict.fromkeys(("paired", "mean", "p50", "p90"), 0)
    num_runs = 20
    for seed in range(num_runs):
        (pair,) = compare(
            _both(seed, ratio), ["a", "b"], _starts(), settings=Settings(seed, num_draws=200)
        )
        for statistic in num_held:
            row = _row(pair, "ttft_s", statistic)
            assert row.low is not None
            assert row.high is not None
            num_held[statistic] += row.low <= ratio <= row.high
    assert min(num_held.values()) >= 17, num_held  # of 20: 95 % leaves out 1 on average
    assert sum(num_held.values()) >= 0.93 * num_runs * len(num_held), num_held


def test_the_same_seed_gives_the_same_intervals() -> None:
    records = _both(3, 1.1)
    assert compare(records, ["a", "b"], _starts(), settings=FEW) == compare(
        records, ["a", "b"], _starts(), settings=FEW
    )


def test_pairs_are_matched_by_index_whatever_the_order() -> None:
    records = _both(1, 1.25)
    backwards = compare(records[::-1], ["a", "b"], _starts(), settings=FEW)
    assert backwards == compare(records, ["a", "b"], _starts(), settings=FEW)
    assert backwards[0].num_pairs == 8 * NUM_PER_BLOCK


def test_a_request_that_one_side_lacks_is_no_pair() -> None:
    records = [one for one in _both(1, 1.0) if (one.target, one.index) != ("b", 5)]
    (pair,) = compare(records, ["a", "b"], _starts(), settings=FEW)
    assert pair.num_pairs == 8 * NUM_PER_BLOCK - 1


def test_more_than_two_targets_are_each_held_against_the_first() -> None:
    records = [
        _record(name, index, 0.1 * factor * (1 + index % 7))
        for name, factor in (("a", 1.0), ("b", 2.0), ("c", 0.5))
        for index in range(80)
    ]
    pairs = compare(records, ["a", "b", "c"], [0, 40])
    assert [(pair.base, pair.target) for pair in pairs] == [("a", "b"), ("a", "c")]
    assert [_row(pair, "ttft_s", "p50").ratio for pair in pairs] == pytest.approx([2.0, 0.5])
    assert [_row(pair, "ttft_s", "p50").verdict for pair in pairs] == ["worse", "better"]
    assert _row(pairs[0], "tpot_s", "p50").verdict == "same"


def test_failures_rank_above_every_latency() -> None:
    records = [_record("a", index, 0.1 + 0.001 * index) for index in range(100)]
    records += [
        _record("b", index, 0.1 + 0.001 * index, outcome="ok" if index % 4 else "timeout")
        for index in range(100)
    ]
    (pair,) = compare(records, ["a", "b"], [0, 50])
    row = _row(pair, "ttft_s", "p90")
    assert row.ratio is None
    assert row.refused == "too many failed"
    p50 = _row(pair, "ttft_s", "p50")
    assert p50.ratio is not None
    assert p50.ratio > 1.0
    answered = _row(pair, "answered", "share")
    assert answered.ratio == pytest.approx(-0.25)
    assert answered.verdict == "worse"


def test_a_small_sample_has_no_p99() -> None:
    (pair,) = compare(_both(0, 1.0, 2), ["a", "b"], _starts(2))
    row = _row(pair, "ttft_s", "p99")
    assert row.ratio is None
    assert row.refused == "n too small: 120 of 299"


def test_every_figure_can_be_written_down() -> None:
    pairs = compare(_both(0, 1.0, 2), ["a", "b"], _starts(2), settings=FEW)
    assert msgspec.json.decode(msgspec.json.encode(pairs), type=list[Pair]) == pairs


def test_nothing_at_all_is_refused_and_does_not_crash() -> None:
    (pair,) = compare([], ["a", "b"], [0])
    assert pair.num_pairs == 0
    assert all(row.ratio is None and row.refused for row in pair.rows)


def test_attainment_is_a_difference_of_shares() -> None:
    slo = Slo({"default": Objective(ttft=Deadline(0.15))})
    records = [_record("a", index, 0.1) for index in range(100)]
    records += [_record("b", index, 0.2 if index < 30 else 0.1) for index in range(100)]
    (pair,) = compare(records, ["a", "b"], [0, 50], slo=slo)
    row = _row(pair, "attainment", "share")
    assert row.is_difference
    assert row.base == 1.0
    assert row.target == pytest.approx(0.7)
    assert row.ratio == pytest.approx(-0.3)


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.96, 1.04, "same"),
        (0.97, 0.99, "same"),  # sure, and too small to matter
        (0.7, 0.9, "better"),
        (1.01, 1.2, "worse"),
        (0.9, 1.2, "unclear"),
    ],
)
def test_words(low: float, high: float, word: str) -> None:
    assert judge(low, high, 1 / 1.05, 1.05) == word


def test_gates() -> None:
    pairs = compare(_both(2, 1.3), ["a", "b"], _starts(), settings=FEW)
    assert conclude(pairs, [parse_gate("ttft_s.p50=2")])[0] == "pass"
    outcome, reasons = conclude(pairs, [parse_gate("ttft_s.paired=1.1")])
    assert outcome == "fail"
    assert "b against a: TTFT, request by request" in reasons[0]
    middle = _row(pairs[0], "ttft_s", "p50").ratio
    assert middle is not None
    assert conclude(pairs, [parse_gate(f"ttft_s.p50={middle}")])[0] == "unclear"
    assert conclude(pairs, [parse_gate(f"ttft_s.p50={middle}")], strict=True)[0] == "fail"
    assert not math.isnan(middle)


@pytest.mark.parametrize("text", ["", "ttft_s", "ttft_s.p50", "ttft_s.p75=1", "nothing.p50=1"])
def test_gates_that_say_nothing(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_gate(text)
