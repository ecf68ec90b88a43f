"""Who is let in, and what the others are told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.config import Limits
from coordinator.requests.admission import (
    MANY,
    MAX_RETRY_AFTER_S,
    RUSH_WINDOW_S,
    Admission,
    Departures,
    Rush,
)
from protocol.errors import RequestError

LIMITS = Limits(max_requests=100, tenant_share=0.75)


def refusal(admission: Admission, num: int, held: tuple[int, int], now: float) -> RequestError:
    with pytest.raises(RequestError) as caught:
        admission.check("a", num, held, now)
    return caught.value


def test_one_tenant_may_have_it_all() -> None:
    admission = Admission(LIMITS, lambda: 1)
    admission.check("a", 1, (99, 99), 0.0)
    error = refusal(admission, 1, (100, 100), 0.0)
    assert (error.status, error.code) == (503, "overloaded")


def test_one_of_several_leaves_room_for_the_others() -> None:
    admission = Admission(LIMITS, lambda: 2)
    admission.check("a", 1, (74, 74), 0.0)
    error = refusal(admission, 1, (75, 75), 0.0)
    assert (error.status, error.code) == (429, "too_many_requests")
    admission.check("b", 25, (0, 75), 0.0)


def test_what_can_never_be_served_is_told_so() -> None:
    assert refusal(Admission(LIMITS, lambda: 1), 101, (0, 0), 0.0).status == 400
    assert refusal(Admission(LIMITS, lambda: 2), 76, (0, 0), 0.0).status == 400


def test_all_of_a_request_or_nothing() -> None:
    admission = Admission(LIMITS, lambda: 1)
    admission.check("a", 8, (0, 92), 0.0)
    assert refusal(admission, 8, (0, 93), 0.0).status == 503


def test_the_cluster_ends() -> None:
    admission = Admission(LIMITS, lambda: 1)
    admission.close(RequestError("the end", code="shutting_down", status=503))
    assert refusal(admission, 1, (0, 0), 0.0).code == "shutting_down"


@given(per_s=st.floats(0.01, 1000.0), seconds=st.floats(5.0, 300.0))
def test_a_constant_rate_is_found(per_s: float, seconds: float) -> None:
    departures, now = Departures(), 0.0
    while now < seconds and now * per_s < 3000:
        departures.ended(now)
        now += 1 / per_s
    if now * per_s > 20:
        assert departures.per_s(now) == pytest.approx(per_s, rel=0.25)


def test_a_rate_fades_when_nothing_ends_any_more() -> None:
    departures = Departures()
    for tenth in range(1000):
        departures.ended(tenth / 10)
    assert departures.per_s(100.0) == pytest.approx(10.0, rel=0.1)
    assert departures.per_s(400.0) < 0.01


@given(
    per_s=st.floats(0.01, 100.0),
    nums=st.lists(st.integers(1, 50), min_size=1, max_size=200),
)
def test_the_wait_grows_with_those_before_and_is_bounded(per_s: float, nums: list[int]) -> None:
    admission = Admission(LIMITS, lambda: 1)
    for number in range(200):
        admission.ended(number / per_s)
    now, waits = 200 / per_s, []
    for num in nums:
        error = refusal(admission, num, (0, 100), now)
        waits.append(error.retry_after_s)
    assert all(1 <= wait <= MAX_RETRY_AFTER_S for wait in waits)
    assert waits == sorted(waits), "who comes later waits no less"
    expected = min(sum(nums) / per_s, MAX_RETRY_AFTER_S)
    assert waits[-1] == pytest.approx(expected, rel=0.3, abs=1.5)


def test_before_anything_has_ended() -> None:
    assert refusal(Admission(LIMITS, lambda: 1), 1, (0, 100), 0.0).retry_after_s == 5


def test_the_share_follows_the_number_of_keys() -> None:
    tenants = ["a"]
    admission = Admission(LIMITS, lambda: len(tenants))
    admission.check("a", 1, (80, 80), 0.0)
    tenants.append("b")
    assert refusal(admission, 1, (80, 80), 0.0).status == 429
    tenants.pop()
    admission.check("a", 1, (80, 80), 0.0)


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
    assert rush.is_on(RUSH_WINDOW_S - 0.1)
    assert not rush.is_on(RUSH_WINDOW_S)
