"""Arrivals, workloads and schedules: the laws they follow, and that the seed decides everything."""

import math
from itertools import islice, pairwise
from random import Random
from statistics import fmean, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.load.sweep import wording_of
from bench.load.workload.arrival import (
    Arrival,
    Constant,
    Gamma,
    OnOff,
    Poisson,
    Ramp,
    Replay,
    at_rate,
    before,
    check_arrival,
    grid_of,
)
from bench.load.workload.lengths import count_of, sampler
from bench.load.workload.prompts import tokens_of
from bench.load.workload.schedule import Schedule, draw, ideal_cached_share
from bench.load.workload.sessions import (
    Cancellations,
    Documents,
    Lengths,
    Mixed,
    PrefixTree,
    Segment,
    Sessions,
    Workload,
)
from protocol.errors import ConfigError

WORKLOADS: list[Workload] = [Lengths(), PrefixTree(), Documents(), Sessions(), Mixed()]


def _times(arrival: Arrival, count: int = 20_000, seed: int = 0) -> list[float]:
    return list(islice(arrival.times(Random(seed)), count))


@pytest.mark.parametrize(
    ("arrival", "cv"),
    [(Poisson(7.0), 1.0), (Gamma(7.0, 0.3), 0.3), (Gamma(7.0, 3.0), 3.0), (Constant(7.0), 0.0)],
)
def test_rate_and_variation(arrival: Arrival, cv: float) -> None:
    times = _times(arrival)
    gaps = [later - earlier for earlier, later in pairwise([0.0, *times])]
    assert 1 / fmean(gaps) == pytest.approx(7.0, rel=0.05)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(cv, abs=0.05 + 0.05 * cv)


def test_bursts_keep_the_rate_and_are_bursts() -> None:
    times = list(before(OnOff(10.0, peak=5.0, on_s=2.0, idle=0.1).times(Random(1)), 8000.0))
    assert len(times) / 8000.0 == pytest.approx(10.0, rel=0.1)
    counts = [0] * 8000
    for time_s in times:
        counts[int(time_s)] += 1
    assert pstdev(counts) ** 2 / fmean(counts) > 5  # Poisson's is 1
    assert times == sorted(times)


def test_a_ramp_has_its_rates() -> None:
    times = list(
        Ramp(((0.0, 100.0, 50.0), (100.0, 100.0, 50.0), (20.0, 20.0, 100.0))).times(Random(0))
    )
    parts = [sum(low <= t < high for t in times) for low, high in ((0, 25), (25, 50), (50, 100))]
    assert parts == [pytest.approx(n, rel=0.12) for n in (625, 1875, 5000)]
    assert sum(t >= 100 for t in times) == pytest.approx(2000, rel=0.1)
    assert max(times) < 200
    assert times == sorted(times)


def test_replay_keeps_order_of_rows_and_jitter_its_width() -> None:
    stamps = (5.0, 5.0, 8.0, 8.0)
    assert _times(Replay(stamps, speed=2.0)) == [0.0, 0.0, 1.5, 1.5]
    jittered = _times(Replay(stamps, jitter_s=3.0))
    assert all(0 <= t - s + 5.0 < 3.0 for t, s in zip(jittered, stamps, strict=True))
    assert len(set(jittered)) == 4


def test_a_grid_is_seen_where_there_is_one() -> None:
    assert grid_of([0.0, 0.0, 0.0, 3.0, 3.0, 3.0, 6.0, 6.0]) == 3.0
    assert grid_of([0.0, 0.1, 0.25, 0.3]) == 0.0
    assert grid_of([1.0]) == 0.0


@pytest.mark.parametrize(
    "arrival",
    [Poisson(3.0), Gamma(3.0, 2.0), OnOff(3.0), Ramp(((2.0, 4.0, 10.0),)), Replay((0.0, 1.0, 5.0))],
)
def test_another_rate(arrival: Arrival) -> None:
    faster = at_rate(arrival, 6.0)
    match faster:
        case Ramp(stages=stages):
            assert stages == ((4.0, 8.0, 10.0),)
        case Replay(speed=speed):
            assert speed == pytest.approx(6.0 / 0.4)
        case _:
            assert faster.rate == 6.0


@pytest.mark.parametrize(
    "arrival",
    [
        Poisson(0.0),
        Poisson(math.inf),
        Gamma(1.0, 0.0),
        OnOff(1.0, peak=1.0),
        Ramp(()),
        Replay((), 0),
    ],
)
def test_impossible_arrivals(arrival: Arrival) -> None:
    with pytest.raises(ConfigError):
        check_arrival(arrival)


@pytest.mark.parametrize(
    ("spec", "low", "high", "mean"),
    [
        ("512", 512, 512, 512),
        ("uniform/100/300", 100, 300, 200),
        ("lognormal/100/0.5", 5, 2000, 100 * math.exp(0.125)),
        ("exponential/50", 1, 2000, 50),
        ("choice/10/10/40", 10, 40, 20),
    ],
)
def test_lengths(spec: str, low: int, high: int, mean: float) -> None:
    random, draw_one = Random(3), count_of(spec)
    drawn = [draw_one(random) for _ in range(5000)]
    assert low <= min(drawn) <= max(drawn) <= high
    assert fmean(drawn) == pytest.approx(mean, rel=0.06)


@pytest.mark.parametrize(
    "spec", ["", "x", "uniform/1", "uniform/3/1", "choice", "normal/1/2", "-4", "1e9"]
)
def test_what_is_no_length(spec: str) -> None:
    with pytest.raises(ConfigError):
        sampler(spec)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: type(w).__name__)
def test_the_seed_decides_everything(workload: Workload) -> None:
    one, two, three = (
        draw(workload, Poisson(5.0), seed, duration_s=30.0, cancellations=Cancellations(0.3))
        for seed in (1, 1, 2)
    )
    assert one == two
    assert one.sha256 == two.sha256 != three.sha256
    assert [planned.index for planned in one.requests] == list(range(len(one.requests)))
    assert one.duration_s < 30.0


def test_documents_are_cold_once() -> None:
    schedule = draw(Documents(questions="3"), Poisson(2.0), 0, duration_s=20.0)
    for turns in schedule.sessions:
        assert [planned.what.kind for planned in turns] == ["document", "question", "question"]
        assert len({planned.what.segments[0] for planned in turns}) == 1
        assert len({planned.what.segments[1] for planned in turns}) == 3


def test_a_prefix_tree_shares_what_it_should() -> None:
    tree = PrefixTree(depth=2, fanout=2, segment="100", tail="100", output="1")
    share = ideal_cached_share(draw(tree, Poisson(50.0), 0, duration_s=20.0))
    assert share == pytest.approx(2 / 3, abs=0.01)
    lengths = draw(Lengths(), Poisson(50.0), 0, duration_s=20.0)
    assert ideal_cached_share(lengths) == 0.0


def test_history_is_cached_and_mixed_kinds_are_told() -> None:
    chat = Sessions(first="100", message="100", turns="3")
    assert ideal_cached_share(draw(chat, Poisson(1.0), 0, duration_s=20.0)) == pytest.approx(3 / 6)
    mixed = draw(Mixed(long_share=0.25), Poisson(50.0), 0, duration_s=20.0)
    share = fmean(planned.what.kind == "long" for planned in mixed.requests)
    assert share == pytest.approx(0.25, abs=0.05)


def test_only_last_turns_are_cancelled() -> None:
    plan = Cancellations(0.5, "uniform/1/2")
    schedule = draw(Sessions(turns="3"), Poisson(10.0), 0, duration_s=20.0, cancellations=plan)
    leaving = [planned for planned in schedule.requests if planned.cancel_after_s is not None]
    assert {planned.turn for planned in leaving} == {2}
    assert len(leaving) / len(schedule.sessions) == pytest.approx(0.5, abs=0.1)
    assert all(1 <= (planned.cancel_after_s or 0) <= 2 for planned in leaving)


@settings(max_examples=25)
@given(st.integers(1, 7), st.sampled_from(WORKLOADS))
def test_dealing_loses_nothing_and_splits_no_session(num_parts: int, workload: Workload) -> None:
    schedule = draw(workload, Poisson(3.0), 0, duration_s=20.0)
    parts = schedule.deal(num_parts)
    dealt = [planned for part in parts for planned in part.requests]
    assert sorted(planned.index for planned in dealt) == list(range(len(schedule.requests)))
    owners = [{planned.session for planned in part.requests} for part in parts]
    assert sum(map(len, owners)) == len(schedule.sessions)


def test_limits() -> None:
    assert len(draw(Sessions(), Poisson(9.0), 0, duration_s=9e9, max_requests=17).requests) == 17
    with pytest.raises(ConfigError, match="no request"):
        draw(Lengths(), Poisson(0.001), 0, duration_s=0.1)
    with pytest.raises(ConfigError, match="share"):
        draw(Mixed(long_share=2.0), Poisson(1.0), 0, duration_s=9.0)
    assert Schedule(1, 0, ()).duration_s == 0.0


def test_rates_of_a_sweep_have_words_of_their_own() -> None:
    """Else a server would find in its cache at one rate what it computed at another."""
    points = [(seed, rate) for seed in (0, 1) for rate in (1.0, 2.0, 4.0)]
    wordings = {wording_of(*point) for point in points}
    assert len(wordings) == len(points) and wording_of(0, 2.0) in wordings
    segment = Segment("short/0", 40)
    said = {tuple(tokens_of(wording, segment, (5, 400))) for wording in wordings}
    assert len(said) == len(points)
