"""Every metric by its definition, on requests whose answer can be told in the head."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load.analysis.metrics import (
    METRICS_VERSION,
    after,
    distribution,
    fluidity_of,
    itls_of,
    littles_law_error,
    summarise,
    ttft_of,
    ttft_sent_of,
)
from bench.load.analysis.slo import Deadline, Objective, Slo, tpot_of
from bench.load.record import RequestRecord

ONE = RequestRecord(
    target="a",
    index=0,
    session="s",
    turn=0,
    kind="chat",
    intended_s=10.0,
    sent_s=10.5,
    headers_s=10.6,
    token_times_s=(12.0, 12.5, 14.5),
    token_counts=(1, 2, 4),
    finished_s=14.75,
    num_prompt_tokens=2000,
    num_output_tokens=7,
    max_tokens=7,
    outcome="ok",
)
SLO = Slo({"chat": Objective(Deadline(1.0, 0.25, 0.125), 0.5, None, 0.9)})


def _change(**fields: object) -> RequestRecord:
    return msgspec.structs.replace(ONE, **fields)


def test_one_request() -> None:
    summary = summarise([ONE])
    means = {name: values.mean for name, values in summary.metrics.items()}
    assert means == {
        "ttft_s": 2.0,
        "ttft_sent_s": 1.5,
        "tpot_s": pytest.approx(2.5 / 6),
        "itl_s": pytest.approx(2.5 / 6),
        "icl_s": 1.25,
        "max_gap_s": 2.0,
        "e2e_s": 4.75,
        "normalized_s": pytest.approx(4.75 / 7),
        "send_lag_s": 0.5,
    }
    assert list(itls_of(ONE)) == [0.25, 0.25, 0.5, 0.5, 0.5, 0.5]
    assert summary.metrics["itl_s"].count == 6
    assert summary.metrics["icl_s"].count == 2
    assert summary.outcomes == {"ok": 1}
    assert summary.metrics_version == METRICS_VERSION
    assert summary.attainment is None
    assert summary.attains is None


def test_one_token_has_no_tpot() -> None:
    record = _change(token_times_s=(12.0,), token_counts=(1,), num_output_tokens=1)
    summary = summarise([record], SLO)
    assert tpot_of(record) is None
    assert "tpot_s" not in summary.metrics
    assert summary.attainment is not None
    assert summary.attainment.num_met == 1  # the TTFT was all that there was to meet
    assert summary.attainment_tpot is not None
    assert summary.attainment_tpot.num == 0


def test_no_itl_without_token_counts() -> None:
    assert list(itls_of(_change(token_counts=()))) == []
    assert "itl_s" not in summarise([_change(token_counts=())]).metrics


@pytest.mark.parametrize(
    "outcome", ["http_error", "timeout", "disconnect", "incomplete", "refused", "unsent"]
)
def test_every_failure_is_a_miss(outcome: str) -> None:
    failed = _change(outcome=outcome, token_times_s=(), token_counts=(), finished_s=None)
    summary = summarise([ONE] * 3 + [failed], SLO)
    for share in (summary.attainment, summary.attainment_ttft, summary.attainment_tpot):
        assert share is not None
        assert (share.num_met, share.num) == (3, 4)
    assert summary.attains is False
    assert summary.metrics["ttft_s"].num_failed == 1
    assert summary.outcomes == {"ok": 3, outcome: 1}


def test_a_failure_that_was_quick_is_no_less_a_miss() -> None:
    failed = _change(outcome="disconnect")  # although its first token came in time
    summary = summarise([failed], SLO)
    assert summary.attainment_ttft is not None
    assert summary.attainment_ttft.num_met == 0


def test_cancelled_by_plan_is_neither_met_nor_missed() -> None:
    cancelled = _change(outcome="cancelled", finished_s=12.6, token_times_s=(30.0,))
    summary = summarise([ONE, cancelled], SLO)
    assert summary.attainment is not None
    assert (summary.attainment.num_met, summary.attainment.num) == (1, 1)
    assert summary.metrics["e2e_s"].count == 1
    assert summary.metrics["ttft_s"].count == 2  # what it did receive is counted


def test_objectives_count_from_the_intended_time() -> None:
    # due 1 + 2 * 0.25 + 4 * 0.125 = 2.0 after it was meant; sent half a second late
    assert SLO.of("chat").ttft_met(ONE)
    late = _change(token_times_s=(12.01, 12.5, 14.5))
    assert ttft_sent_of(late) == pytest.approx(1.51)
    assert not SLO.of("chat").ttft_met(late)


def test_joint_attainment_is_not_the_product_of_its_parts() -> None:
    slow_start = _change(token_times_s=(13.0, 13.5, 14.5))
    slow_tokens = _change(token_times_s=(12.0, 12.5, 16.5), finished_s=17.0)
    summary = summarise([ONE, ONE, slow_start, slow_tokens], SLO)
    shares = (summary.attainment, summary.attainment_ttft, summary.attainment_tpot)
    assert [share and share.num_met for share in shares] == [2, 3, 3]


def test_kinds_stand_by_themselves() -> None:
    slow = _change(kind="long", intended_s=0.0)
    summary = summarise([ONE, slow], Slo({**SLO.objectives, "long": Objective(Deadline(1.0))}))
    assert [kind.attains for kind in summary.by_kind.values()] == [True, False]
    assert summary.attains is False


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ((1.0, 2.0, 3.0), 1.0),  # each on its deadline
        ((0.2, 2.0, 3.0), 1.0),  # what was early may be late
        ((1.5, 2.5, 3.5), 2 / 3),  # one miss, and the deadlines start anew from it
        ((1.0, 4.5, 5.5), 2 / 5),  # 2.5 late: three deadlines missed, then one met
    ],
)
def test_fluidity(times: tuple[float, ...], expected: float) -> None:
    record = _change(intended_s=0.0, token_times_s=times, token_counts=(1, 1, 1))
    objective = Objective(Deadline(1.0), 1.0)
    assert fluidity_of(record, objective) == pytest.approx(expected)


def test_fluidity_needs_both_promises() -> None:
    assert fluidity_of(ONE, Objective(Deadline(1.0))) is None
    assert fluidity_of(ONE, Objective(None, 1.0)) is None


def test_a_percentile_of_too_few_is_refused() -> None:
    values = distribution([float(n) for n in range(1, 299)])
    assert values.p99 is None
    assert values.refused == {"p99": "n too small: 298 of 299"}
    assert values.p50 == 149.0
    whole = distribution([float(n) for n in range(1, 300)])
    assert whole.p99 == 297.0
    assert whole.interval["p99"][1] == math.inf  # 299 bound it from one side only


def test_a_percentile_among_the_failed_is_refused() -> None:
    values = distribution([1.0] * 294, num_failed=6)
    assert values.p90 == 1.0
    assert values.p99 is None
    assert values.refused == {"p99": "6 of 300 failed before"}
    assert distribution([1.0] * 298, num_failed=2).p99 == 1.0


def test_of_what_is_good_a_percentile_is_what_that_share_reaches() -> None:
    values = distribution([n / 1000 for n in range(1, 1001)], is_good=True)
    assert values.p99 == pytest.approx(0.011)
    low, high = values.interval["p99"]
    assert low <= 0.011 <= high


@given(st.permutations(list(range(40))))
def test_order_changes_no_percentile(order: list[int]) -> None:
    values = distribution([float(n) for n in order])
    assert (values.p50, values.p90, values.mean) == (19.0, 35.0, 19.5)


def test_throughput() -> None:
    records = [_change(intended_s=float(n), sent_s=float(n), finished_s=15.0) for n in range(11)]
    rates = summarise(records, SLO).throughput
    assert rates.span_s == 15.0
    assert rates.offered_requests == 1.0
    assert rates.completed_requests == pytest.approx(11 / 15)
    assert rates.prompt_tokens == pytest.approx(11 * 2000 / 15)
    assert rates.output_tokens == pytest.approx(11 * 7 / 15)
    assert rates.cached_share is None
    cached = [_change(num_cached_tokens=500), _change(num_cached_tokens=0), ONE]
    assert summarise(cached).throughput.cached_share == pytest.approx(500 / 4000)
    assert rates.good_requests == pytest.approx(1 / 15)  # only the last one's TTFT is 2 s


def test_the_warm_up_is_left_out() -> None:
    assert after([ONE, _change(intended_s=3.0)], 5.0) == [ONE]


def test_littles_law() -> None:
    records = [_change(sent_s=float(n), finished_s=n + 2.0) for n in range(9)]  # 18 s in 10 s
    assert littles_law_error(records, 1.8, 10.0) == pytest.approx(0.0)
    assert littles_law_error(records[:-1], 1.8, 10.0) == pytest.approx(0.2 / 1.8)  # one was lost
    assert littles_law_error([], 0.0, 0.0) is None


def test_no_requests_at_all() -> None:
    summary = summarise([], SLO)
    assert summary.num_requests == 0
    assert summary.throughput.span_s == 0.0
    assert ttft_of(_change(token_times_s=())) is None
