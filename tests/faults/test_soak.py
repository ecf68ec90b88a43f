"""What a soak calls growth, and what it does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.campaign.soak.memory import MIB, History, Sample, sen_slope


def _history(sizes_mib: list[float], every_s: float = 10.0) -> History:
    samples = [
        Sample(number * every_s, int(size * MIB), num_files=10, num_threads=2)
        for number, size in enumerate(sizes_mib)
    ]
    return History(samples)


@given(st.integers(2, 30), st.floats(-5, 5), st.floats(1000, 2000))
def test_a_line_has_its_slope(num_minutes: int, per_sample: float, start: float) -> None:
    history = _history([start + per_sample * number for number in range(6 * num_minutes)])
    assert history.slope == pytest.approx(6 * per_sample, abs=1e-3)


def test_a_few_odd_minutes_are_no_growth() -> None:
    flat = [300.0] * 6 * 60
    for minute in (3, 17, 40):
        flat[6 * minute : 6 * minute + 6] = [500.0] * 6
    assert _history(flat).slope == 0.0


def test_steps_that_stay_are_growth() -> None:
    steps = [300.0 + 12.0 * (minute // 20) for minute in range(60) for _ in range(6)]
    assert _history(steps).slope > 0.1


def test_the_warm_up_does_not_count() -> None:
    history = _history([100.0 + number for number in range(240)] + [340.0] * 120)
    assert history.slope > 0.0
    assert history.after(2400.0).slope == 0.0


def test_without_two_minutes_there_is_no_slope() -> None:
    assert sen_slope([]) == sen_slope([(1.0, 2.0)]) == 0.0
