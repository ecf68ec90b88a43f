"""Batching: nothing to gain where all answers are equally long, much where they are not."""

import pytest

from bench.simulate.batching import BatchGate, gain, light, null_case, saturated
from bench.simulate.cluster import Served
from bench.simulate.estimates import pick
from bench.simulate.pools import calm_world
from bench.simulate.report import Scale
from bench.simulate.step_time import MEASURED, ROOFLINE
from bench.simulate.workload import Arrival

SMALL = Scale(2, 0.25)


def test_answers_of_one_length_gain_nothing() -> None:
    rows = [row for steps in (MEASURED, ROOFLINE) for row in saturated(steps, 0.0, SMALL)]
    assert null_case(rows).holds, null_case(rows)


def test_the_gain_is_what_the_longest_answer_of_a_batch_makes_of_it() -> None:
    rows = list(saturated(ROOFLINE, 1.0, SMALL))
    found = gain(rows, ROOFLINE.name, 1.0)
    bounds = pick(rows, "longest_over_mean", policy="static")
    assert 1.5 < found.value < 1.2 * max(bounds)
    filled = {p: pick(rows, "occupied_slots", policy=p) for p in ("continuous", "static")}
    assert min(filled["continuous"]) > 0.9 > max(filled["static"])


def test_batches_cost_waiting() -> None:
    rows = list(light(ROOFLINE, 0.5, Scale(2, 0.25)))
    longest = max(pick(rows, "ttft_p50_s", policy="continuous"))
    for policy in ("static", "dynamic"):
        assert min(pick(rows, "ttft_p50_s", policy=policy)) > 10 * longest


@pytest.mark.parametrize(("window_s", "expected"), [(float("inf"), 3.0), (1.5, 2.5)])
def test_a_batch_goes_when_it_is_full_or_has_waited(window_s: float, expected: float) -> None:
    world = calm_world()
    admitted: list[float] = []
    gate = BatchGate(
        world, lambda _: admitted.append(world.now), size=3, window_s=window_s, num_coming=9
    )
    for number in range(3):
        served = Served(Arrival(number, 1.0 + number, 1, 1))
        world.at(1.0 + number, lambda served=served: gate.arrive(served))  # type: ignore[misc]
    world.run_until(lambda: False, 10.0)
    assert admitted[0] == expected
