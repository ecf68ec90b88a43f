"""The driver's clock joined with the server's: phases end to end, whatever is missing."""

from typing import Any

import pytest

from bench.load.record import RequestRecord
from bench.report.figures.phases import AFTER_FIRST, DECODE, UNTIL_FIRST, phases_of

EVENTS = {
    "arrived": 0.0,
    "tokenized": 0.01,
    "reserved": 0.03,
    "prefill_sent": 0.04,
    "first_token": 0.5,
    "committed": 0.53,
    "first_decode": 0.56,
    "finished": 1.0,
}


def _record(timeline: dict[str, Any] | None, **changes: Any) -> RequestRecord:
    fields: dict[str, Any] = {
        "headers_s": 10.1,
        "token_times_s": (10.62, 10.7, 11.1),
        "token_counts": (1, 1, 1),
        "finished_s": 11.12,
        "num_output_tokens": 3,
        "outcome": "ok",
        "timeline": timeline,
    }
    return RequestRecord("t", 0, "s", 0, "short", 10.0, 10.1, **{**fields, **changes})


def _timeline(events: dict[str, float], prefill: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "requests": [
            {
                "events": events,
                "prefill": prefill,
                "prefill_pool": "prefill0",
                "decode_pool": "decode0",
            }
        ]
    }


def test_phases_of_a_hand_off_by_hand() -> None:
    told = _timeline(EVENTS, {"queue_s": 0.1, "compute_s": 0.3})
    found = {phase.name: phase for phase in phases_of(_record(told))}
    expected = {
        "client lag": (0.0, 0.1),
        "admission": (0.1, 0.11),
        "decode reservation": (0.11, 0.14),
        "prefill queue": (0.14, 0.24),
        "prefill compute": (0.24, 0.54),
        "hand-off": (0.54, 0.6),
        "network and HTTP": (0.6, 0.62),
        "KV transfer not hidden": (0.62, 0.63),
        "decode queue and step": (0.63, 0.66),
        DECODE: (0.66, 1.12),
    }
    assert list(found) == list(expected)
    for name, (start_s, end_s) in expected.items():
        assert (found[name].start_s, found[name].end_s) == pytest.approx((start_s, end_s)), name
    assert found["prefill compute"].pool == "prefill0"
    assert found[DECODE].pool == "decode0"


def test_a_hidden_transfer_has_no_phase() -> None:
    told = _timeline({**EVENTS, "committed": 0.45}, {"queue_s": 0.1, "compute_s": 0.3})
    assert "KV transfer not hidden" not in {phase.name for phase in phases_of(_record(told))}


def test_a_colocated_server_queues_and_prefills_in_one_pool() -> None:
    events = {name: EVENTS[name] for name in ("tokenized", "reserved", "first_token", "finished")}
    told = _timeline(events, None)
    told["requests"][0]["prefill_pool"] = None
    found = {phase.name: phase.pool for phase in phases_of(_record(told))}
    assert found["queue and prefill"] == "decode0"
    assert "prefill queue" not in found


@pytest.mark.parametrize("timeline", [None, {}, {"requests": []}, {"requests": [{}]}])
def test_a_server_that_tells_nothing(timeline: dict[str, Any] | None) -> None:
    names = [phase.name for phase in phases_of(_record(timeline))]
    assert names == ["client lag", UNTIL_FIRST, AFTER_FIRST]


def test_a_failure_ends_where_it_was_seen() -> None:
    record = _record(None, token_times_s=(), token_counts=(), outcome="timeout")
    names = [phase.name for phase in phases_of(record)]
    assert names == ["client lag", UNTIL_FIRST]
    assert phases_of(record)[-1].end_s == pytest.approx(1.12)


def test_an_unsent_request_has_no_phase() -> None:
    record = RequestRecord("t", 0, "s", 0, "short", 1.0, 1.0)
    assert phases_of(record) == []


@pytest.mark.parametrize("missing", sorted(EVENTS))
def test_phases_lie_end_to_end_whatever_is_missing(missing: str) -> None:
    events = {name: at for name, at in EVENTS.items() if name != missing}
    for prefill in (None, {}, {"queue_s": 0.1, "compute_s": 0.3}, {"queue_s": 9.0}):
        phases = phases_of(_record(_timeline(events, prefill)))
        ends = [phase.end_s for phase in phases]
        assert ends == sorted(ends)
        assert [phase.start_s for phase in phases] == [0.0, *ends[:-1]]
