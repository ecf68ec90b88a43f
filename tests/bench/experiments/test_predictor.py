"""Predicted lengths: no effect where nobody waits or all are equal, and noise is what it says."""

import statistics

import pytest

from bench.simulate.cluster import Cluster, ClusterSetting
from bench.simulate.estimates import pick
from bench.simulate.pools import seeded
from bench.simulate.predictor import (
    FCFS,
    Policy,
    ShortestFirst,
    compare,
    null_cases,
    predictions,
    sigma_of,
    traffic,
)
from bench.simulate.report import Scale
from bench.simulate.step_time import ROOFLINE
from bench.simulate.workload import Arrival

SJF, SRPT = Policy("SJF 0%", 0.0), Policy("SRPT 0%", 0.0, preempts=True)


def test_order_is_nothing_where_nobody_waits_or_all_are_equal() -> None:
    for null in null_cases(Scale(2, 0.35)):
        assert null.holds, null


@pytest.mark.parametrize("error", [0.2, 0.8, 1.5])
def test_the_noise_has_the_error_that_was_asked_for(error: float) -> None:
    random, sigma = seeded("noise"), sigma_of(error)
    drawn = [abs(random.lognormvariate(0.0, sigma) - 1) for _ in range(100_000)]
    assert statistics.fmean(drawn) == pytest.approx(error, rel=0.05)


def test_a_perfect_prediction_is_the_length() -> None:
    arrivals = traffic(ROOFLINE, 0.5, 0, 20)
    predicted = predictions(SJF, arrivals, 0)
    assert list(predicted.values()) == pytest.approx([a.num_output_tokens for a in arrivals])
    buckets = predictions(Policy("two", 0.0, buckets=True), arrivals, 0)
    assert set(buckets.values()) == {0.0, 1.0}


def test_shortest_first_helps_the_mean_and_hurts_the_longest() -> None:
    rows = list(compare(ROOFLINE, 0.95, Scale(2, 0.4), (FCFS, SJF)))
    fcfs, sjf = (pick(rows, "e2e_mean_s", policy=name) for name in ("FCFS", "SJF 0%"))
    assert sum(sjf) < sum(fcfs)
    fcfs, sjf = (pick(rows, "longest_tenth_s", policy=name) for name in ("FCFS", "SJF 0%"))
    assert sum(sjf) > sum(fcfs)


def test_who_is_set_aside_comes_back_and_ends_right() -> None:
    arrivals = [Arrival(0, 0.0, 32, 200), Arrival(1, 0.5, 32, 10)]
    lengths = {0: 200.0, 1: 10.0}
    cluster = Cluster(
        ClusterSetting(ROOFLINE),
        lambda cluster: ShortestFirst(cluster, 1, lengths, preempts=True),
    )
    long, short = cluster.run(arrivals)
    assert (len(long.token_times_s), len(short.token_times_s)) == (200, 10)
    assert short.token_times_s[-1] < long.token_times_s[-1]
    assert max(long.itls_s) > 5 * statistics.median(long.itls_s)
    cluster.world.run_until(lambda: False, 1e9)
    for pool in cluster.decode.values():
        pool.node.check()
        assert pool.node.is_idle
