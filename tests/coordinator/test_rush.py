"""When a document's segments are computed in small chunks."""

import pytest

from coordinator.requests.rush import MANY, WINDOW_S, Rush


@pytest.mark.parametrize(
    ("pause_s", "is_on"), [(5.0, False), (2.6, False), (2.4, True), (1.0, True), (0.01, True)]
)
def test_only_many_requests_make_a_rush(pause_s: float, is_on: bool) -> None:
    rush = Rush()
    for number in range(20):
        rush.arrived(number * pause_s)
    assert rush.is_on(19 * pause_s) == is_on


def test_a_rush_is_over_when_they_stay_away() -> None:
    rush = Rush()
    assert not rush.is_on(0.0)
    for _ in range(MANY - 1):
        rush.arrived(0.0)
        assert not rush.is_on(0.0)
    rush.arrived(0.0)
    assert rush.is_on(WINDOW_S - 0.1)
    assert not rush.is_on(WINDOW_S)
