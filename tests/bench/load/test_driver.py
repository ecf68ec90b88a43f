"""The driver against a server with known behaviour, both in one event loop."""

import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import msgspec
import pytest

from bench.load.analysis.metrics import summarise
from bench.load.analysis.slo import Deadline, Objective, Slo
from bench.load.analysis.validity import invalid_reasons
from bench.load.driving.client import Budgets
from bench.load.driving.driver import Driver
from bench.load.record import RequestRecord
from bench.load.workload.prompts import Api
from bench.load.workload.schedule import Planned, Schedule
from bench.load.workload.sessions import Segment, Turn
from tests.bench.toy_server import ToyConfig

QUICK = ToyConfig(base_s=0.01, prefill_s_per_1k=0.0, token_s=0.002)
Drive = Callable[..., Any]
Evenly = Callable[..., Schedule]


def _session(num_turns: int, *, think_s: float = 0.01, keeps_history: bool = True) -> Schedule:
    return Schedule(
        1,
        0,
        tuple(
            Planned(
                turn,
                "s",
                0.0,
                turn,
                Turn(
                    "turn",
                    (Segment(f"t{turn}", 10),),
                    4,
                    think_s if turn else 0.0,
                    keeps_history and turn > 0,
                ),
            )
            for turn in range(num_turns)
        ),
    )


def test_every_request_is_sent_when_it_was_meant(drive: Drive, evenly: Evenly) -> None:
    driven = drive(evenly(20, 0.01), QUICK)
    assert Counter(record.outcome for record in driven.records) == {"ok": 20}
    for number, record in enumerate(driven.records):
        assert record.intended_s == pytest.approx(number * 0.01, abs=1e-6)
        assert record.intended_s <= record.sent_s
        assert record.headers_s is not None
        assert record.sent_s < record.headers_s < record.token_times_s[0]
        assert record.token_times_s == tuple(sorted(record.token_times_s))
        assert record.token_counts == (1,) * 5
        assert (record.num_prompt_tokens, record.num_output_tokens) == (10, 5)
        assert record.finish_reason == "length"
        assert record.request_id == f"test-{number}"
    served = {entry.request_id: entry for entry in driven.server.log}
    for record in driven.records:
        left = [at - driven.started for at in served[record.request_id].left]
        assert all(a <= b for a, b in zip(left, record.token_times_s, strict=True))
    assert driven.audit.num_connections < 20  # they were used again
    assert driven.audit.mean_in_flight > 0


def test_a_stall_stops_nobody_from_coming(drive: Drive, evenly: Evenly) -> None:
    config = msgspec.structs.replace(QUICK, stalls=((0.1, 0.5),))
    driven = drive(evenly(40, 0.01), config)
    assert median(record.sent_s - record.intended_s for record in driven.records) < 0.1
    ttfts = [record.token_times_s[0] - record.intended_s for record in driven.records]
    assert max(ttfts) > 0.4
    assert sum(ttft > 0.1 for ttft in ttfts) > 20


@pytest.mark.parametrize(
    ("rate", "outcome", "status", "code"),
    [
        ("failure_rate", "http_error", 500, "toy_failure"),
        ("error_rate", "http_error", 200, "toy_error"),
        ("disconnect_rate", "disconnect", 200, "no_end_marker"),
    ],
)
def test_failures_are_told_apart_and_miss(
    drive: Drive, evenly: Evenly, rate: str, outcome: str, status: int, code: str
) -> None:
    driven = drive(evenly(40, 0.002), msgspec.structs.replace(QUICK, **{rate: 0.3}))
    fates = Counter(entry.fate for entry in driven.server.log)
    failed = [record for record in driven.records if record.outcome != "ok"]
    assert 0 < len(failed) == fates.total() - fates["ok"]
    assert {(r.outcome, r.status, r.error_code) for r in failed} == {(outcome, status, code)}
    share = summarise(driven.records, Slo({"default": Objective(Deadline(60.0))})).attainment
    assert share is not None
    assert (share.num_met, share.num) == (40 - len(failed), 40)
    assert (
        invalid_reasons(driven.records, [driven.audit], 41, None)[-1] == "40 records of 41 requests"
    )


def test_nobody_listens(drive: Drive, evenly: Evenly) -> None:
    driven = drive(evenly(3, 0.01), QUICK, url="http://127.0.0.1:9")
    assert {(r.outcome, r.token_times_s) for r in driven.records} == {("refused", ())}
    assert "not one request succeeded" in invalid_reasons(driven.records, [driven.audit], 3, None)


@pytest.mark.parametrize("budgets", [Budgets(5.0, 20.0, 0.15), Budgets(5.0, 0.15, 20.0)])
def test_every_wait_has_a_budget(drive: Drive, evenly: Evenly, budgets: Budgets) -> None:
    slow = ToyConfig(base_s=30.0)
    driven = drive(evenly(3, 0.01), slow, budgets=budgets)
    for record in driven.records:
        assert record.outcome == "timeout"
        assert record.finished_s is not None
        assert 0.15 <= record.finished_s - record.sent_s < 2.0


def test_tokens_renew_the_budget_of_silence(drive: Drive, evenly: Evenly) -> None:
    steady = ToyConfig(base_s=0.05, token_s=0.05)
    driven = drive(evenly(1, 0.0, output=12), steady, budgets=Budgets(5.0, 0.4, 20.0))
    assert driven.records[0].outcome == "ok"


def test_users_go_away_as_planned(drive: Drive, evenly: Evenly) -> None:
    schedule = evenly(6, 0.01, output=400)
    leaving = tuple(
        msgspec.structs.replace(p, cancel_after_s=0.1 if p.index % 2 else None)
        for p in schedule.requests
    )
    config = ToyConfig(base_s=0.01, token_s=0.001)
    driven = drive(msgspec.structs.replace(schedule, requests=leaving), config)
    for record in driven.records:
        if record.index % 2:
            assert record.outcome == "cancelled"
            assert 0 < len(record.token_times_s) < 400
            assert record.finished_s is not None
            assert record.finished_s - record.sent_s >= 0.1
        else:
            assert record.outcome == "ok"
    share = summarise(driven.records, Slo({"default": Objective()})).attainment
    assert share is not None
    assert (share.num_met, share.num) == (3, 3)


def test_a_turn_waits_for_its_answer_and_the_thought(drive: Drive) -> None:
    driven = drive(_session(3, think_s=0.05), QUICK)
    for before, after in pairwise(driven.records):
        assert before.finished_s is not None
        assert after.intended_s == pytest.approx(before.finished_s + 0.05, abs=1e-6)
    # each prompt has what was said before: 10, then its 4 tokens of answer and 10 more
    assert [record.num_prompt_tokens for record in driven.records] == [10, 24, 38]


@pytest.mark.parametrize("api", [Api.TEXT, Api.CHAT])
def test_words(drive: Drive, api: Api) -> None:
    driven = drive(_session(3), QUICK, api=api)
    assert [record.outcome for record in driven.records] == ["ok"] * 3
    assert [record.num_prompt_tokens for record in driven.records] == [10, 24, 38]


def test_after_a_failure_the_session_is_over(drive: Drive) -> None:
    driven = drive(_session(3), msgspec.structs.replace(QUICK, failure_rate=1.0))
    assert [record.outcome for record in driven.records] == ["http_error", "unsent", "unsent"]
    assert driven.records[2].error_code == "turn_before_failed"
    share = summarise(driven.records, Slo({"default": Objective()})).attainment
    assert share is not None
    assert (share.num_met, share.num) == (0, 3)


def test_a_role_is_no_token(drive: Drive, evenly: Evenly) -> None:
    config = msgspec.structs.replace(QUICK, base_s=0.1, early_role=True)
    driven = drive(evenly(2, 0.01), config, api=Api.CHAT)
    for record in driven.records:
        assert record.token_times_s[0] - record.sent_s >= 0.1
        assert record.num_output_tokens == 5


def test_tokens_are_counted_event_by_event(drive: Drive, evenly: Evenly) -> None:
    config = msgspec.structs.replace(QUICK, tokens_per_event=2)
    driven = drive(evenly(2, 0.01), config)
    assert {record.token_counts for record in driven.records} == {(2, 2, 1)}


def test_unknown_counts_are_not_invented(drive: Drive, evenly: Evenly) -> None:
    config = msgspec.structs.replace(QUICK, tokens_per_event=2, is_strict=True)
    driven = drive(evenly(2, 0.01), config, extensions=False)
    for record in driven.records:
        assert (record.outcome, record.num_output_tokens) == ("ok", 5)
        assert len(record.token_times_s) == 3
        assert record.token_counts == ()
    metrics = summarise(driven.records).metrics
    assert "itl_s" not in metrics
    assert metrics["tpot_s"].count == 2


def test_a_closed_loop_is_never_more_than_its_users(drive: Drive, evenly: Evenly) -> None:
    driven = drive(evenly(30, 0.0), QUICK, users=3)
    assert Counter(record.outcome for record in driven.records) == {"ok": 30}
    moments = sorted(
        [(r.sent_s, 1) for r in driven.records]
        + [(r.finished_s or 0.0, -1) for r in driven.records]
    )
    in_flight = most = 0
    for _, change in moments:
        in_flight += change
        most = max(most, in_flight)
    assert most == 3


def test_stopping_early_records_everything(drive: Drive, evenly: Evenly) -> None:
    driven = drive(evenly(100, 0.02, output=300), QUICK, meanwhile=Driver.stop)
    assert driven.audit.is_stopped
    assert len(driven.records) == 100
    ends = Counter((record.outcome, record.error_code) for record in driven.records)
    assert set(ends) <= {("timeout", "run_stopped"), ("unsent", "run_stopped"), ("ok", "")}
    assert ends["unsent", "run_stopped"] > 50
    assert "it was stopped before its end" in invalid_reasons(
        driven.records, [driven.audit], 100, None
    )


def test_a_lagging_driver_is_no_witness(drive: Drive, evenly: Evenly) -> None:
    """Something else on the driver's core: it cannot send in time, and says so."""

    def occupy(driver: Driver) -> None:  # noqa: ARG001 - what is called gets it
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            pass

    slo = Slo({"default": Objective(Deadline(1.0))})  # p99 of the lag may be 50 ms
    driven = drive(evenly(60, 0.01), QUICK, slo=slo, meanwhile=occupy)
    reasons = invalid_reasons(driven.records, [driven.audit], 60, slo)
    assert reasons[0].startswith("the driver was late: p99 of send lag")
    # and the wait is part of what its users saw, not hidden
    late = max(driven.records, key=lambda record: record.sent_s - record.intended_s)
    assert late.token_times_s[0] - late.intended_s > 0.2


def _requests(records: list[RequestRecord]) -> list[tuple[int, int]]:
    return [(record.index, record.num_prompt_tokens) for record in records]


def test_two_runs_of_one_schedule_ask_the_same(drive: Drive, evenly: Evenly) -> None:
    one, two = (drive(evenly(5, 0.001), QUICK) for _ in range(2))
    assert _requests(one.records) == _requests(two.records)
