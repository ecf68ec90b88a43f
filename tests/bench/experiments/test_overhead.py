"""Overhead: per request it moves the first token alone; per step it is in every gap."""

from bench.simulate.estimates import pick
from bench.simulate.overhead import INJECTED_MS, LOADS, inject, measure, null_cases, slope_of
from bench.simulate.report import Scale
from bench.simulate.step_time import ROOFLINE


def test_once_a_request_leaves_the_gaps_alone() -> None:
    for null in null_cases(Scale(1, 0.25)):
        assert null.holds, null


def test_a_millisecond_a_step_is_at_least_one_in_every_gap() -> None:
    rows = list(inject(ROOFLINE, Scale(2, 0.25)))
    assert len(rows) == 2 * len(LOADS) * len(INJECTED_MS)
    assert slope_of(rows, ROOFLINE.name, "itl_ms").value >= 0.99
    for load in LOADS:
        gaps = pick(rows, "itl_ms", load=load, seed=0)
        assert gaps == sorted(gaps)


def test_the_real_scheduler_is_timed_at_the_batch_that_was_asked_for() -> None:
    found = measure(4, 10, num_steps=20)
    assert 0 < found["p50_us"] <= found["p99_us"]
