"""Split or not: no difference where nobody meets anybody, a difference where stalls count."""

import pytest

from bench.simulate.disaggregation import SLOS, attainments, goodput, null_case
from bench.simulate.estimates import pick
from bench.simulate.report import Scale
from bench.simulate.step_time import MEASURED


def test_chats_one_at_a_time_have_nothing_to_separate() -> None:
    null = null_case(Scale(2, 0.3))
    assert null.holds, null


def test_documents_stall_chats_only_where_they_share_ranks() -> None:
    rows = list(attainments(MEASURED, "mixed", Scale(2, 0.3), loads=(0.5,)))
    slo = SLOS[-1].name
    colocated, split = (
        min(pick(rows, slo, configuration=name)) for name in ("4 colocated", "ring of 2 + 2 decode")
    )
    assert split > colocated + 0.2


@pytest.mark.parametrize(
    ("shares", "expected"),
    [((1.0, 1.0), 0.4), ((1.0, 0.8), 0.3), ((0.5, 0.5), 0.04), ((0.8, 1.0), 0.1)],
)
def test_goodput_is_where_attainment_first_falls_below_its_target(
    shares: tuple[float, ...], expected: float
) -> None:
    assert goodput((0.2, 0.4), shares) == pytest.approx(expected)
