"""The search for goodput, on queues that are simulated: no clock, no sockets."""

import math
from functools import cache
from random import Random
from statistics import fmean

import pytest

from bench.load.analysis.goodput import Goodput, Point, Search, Verdict, judge, most_missed
from bench.load.analysis.slo import Deadline, Objective, Slo
from bench.load.record import RequestRecord
from tests.bench.records import record

SERVICE_S = 0.1
SLO = Slo({"default": Objective(Deadline(0.3), None, None, 0.9)})


def _simulate(rate: float, seed: int, num: int, failures: float = 0.0) -> list[RequestRecord]:
    """One slot, Poisson arrivals, constant service (M/D/1); every request has one token."""
    random = Random(f"{seed}/{rate}")
    now = free = 0.0
    records = []
    for index in range(num):
        now += random.expovariate(rate)
        fails = random.random() < failures
        end = max(now, free) + SERVICE_S
        free = now if fails else end
        told = None if fails else end - now
        outcome = "http_error" if fails else "ok"
        records.append(record(index, told, at_s=now, kind="request", outcome=outcome))
    return records


@cache
def _truth(rate: float, failures: float = 0.0) -> float:
    """Attainment in the long run."""
    objective = SLO.of("request")
    return fmean(map(objective.met, _simulate(rate, -1, 100_000, failures)))


def _search(target: float, seed: int, tolerance: float = 0.05) -> Search:
    slo = Slo({"default": Objective(Deadline(0.3), None, None, target)})
    search = Search(1.0, lowest=0.1, highest=100.0, tolerance=tolerance)
    while (rate := search.next_rate()) is not None:
        rounds: list[list[RequestRecord]] = []
        verdict = None
        while verdict is None:
            rounds.append(_simulate(rate, 100 * seed + len(rounds), 1000))
            verdict = judge(rounds, slo, max_rounds=3)
        search.update(rate, passed=verdict.passed)
    return search


def test_the_search_finds_the_knee() -> None:
    for seed in range(3):
        search = _search(0.9, seed)
        assert search.low is not None
        assert search.high is not None
        assert search.low < search.high <= search.low * 1.05
        assert _truth(5.2) >= 0.93
        assert _truth(6.8) <= 0.85
        assert 5.2 < search.low < search.high < 6.8


def test_a_rate_is_given_up_as_soon_as_that_is_sure() -> None:
    verdict = judge([_simulate(20.0, 0, 100)], SLO, max_rounds=3)
    assert verdict is not None
    assert not verdict.passed
    assert verdict.is_sure


def test_a_pass_needs_its_sample_and_its_interval() -> None:
    good = _simulate(0.5, 0, 200)
    assert judge([good], SLO, max_rounds=3) is None
    verdict = judge([good, good], SLO, max_rounds=3)
    assert verdict is not None
    assert verdict.passed
    assert verdict.is_sure


def test_after_all_rounds_the_estimate_decides_and_says_so() -> None:
    good = _simulate(0.5, 0, 50)
    verdict = judge([good, good, good], SLO, max_rounds=3)
    assert verdict is not None
    assert verdict.passed
    assert not verdict.is_sure
    assert judge([[]], SLO, max_rounds=1) == Verdict(False, False, {})


def test_every_kind_must_attain() -> None:
    slo = Slo({**SLO.objectives, "rare": Objective(Deadline(0.01), None, None, 0.5)})
    verdict = judge(
        [_simulate(0.5, 0, 400) + [record(0, 1.0, kind="rare")] * 20], slo, max_rounds=1
    )
    assert verdict is not None
    assert not verdict.passed
    assert verdict.shares["request"].share > 0.9


def test_bounds_end_the_search() -> None:
    up = Search(1.0, lowest=0.5, highest=3.0)
    tried = []
    while (rate := up.next_rate()) is not None:
        tried.append(rate)
        up.update(rate, passed=True)
    assert tried == [1.0, 2.0, 3.0]
    assert (up.low, up.high) == (3.0, None)
    down = Search(1.0, lowest=0.3, highest=3.0)
    tried = []
    while (rate := down.next_rate()) is not None:
        tried.append(rate)
        down.update(rate, passed=False)
    assert tried == [1.0, 0.5, 0.3]
    assert (down.low, down.high) == (None, 0.3)


def test_per_accelerator() -> None:
    point = Point(2.0, Verdict(True, True, {}), 3)
    assert Goodput(8.0, 10.0, 4, (point,)).per_accelerator == (2.0, 2.5)
    assert Goodput(None, 10.0, 4, ()).per_accelerator == (None, 2.5)


@pytest.mark.parametrize(("target", "num", "most"), [(0.99, 300, 3), (0.9, 100, 10), (0.99, 50, 0)])
def test_how_many_may_miss(target: float, num: int, most: int) -> None:
    slo = Slo({"default": Objective(target=target), "hard": Objective(target=0.999)})
    assert most_missed(slo, num) == most
    assert (num - most) / num >= target - 1e-9
    assert (num - most - 1) / num < target
    assert math.isclose(most_missed(Slo({}), 100), 1)
