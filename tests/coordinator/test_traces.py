"""What is kept of the latest requests is bounded, however wide they are, and small."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from coordinator.attempts import EndedAttempt
from coordinator.records import Record
from coordinator.traces import Trace, Traces
from protocol.request import PrefillPath, SamplingParams
from protocol.timeline import Event
from protocol.token_ids import TokenIds


def trace(number: int, num_sequences: int, client_id: str) -> Trace:
    return Trace(f"r{number}", client_id, "tenant", "model", 0, num_sequences)


@given(st.lists(st.tuples(st.integers(1, 40), st.sampled_from("abc")), max_size=60))
def test_the_latest_are_kept_as_far_as_there_is_room(requests: list[tuple[int, str]]) -> None:
    traces = Traces(max_traces=10, max_sequences=50)
    for number, (num_sequences, client_id) in enumerate(requests):
        traces.add(trace(number, num_sequences, client_id))
        kept = list(traces._by_id.values())
        assert kept[-1].request_id == f"r{number}"
        assert len(kept) <= 10
        assert len(kept) == 1 or sum(one.num_sequences for one in kept) <= 50
        assert traces._num_sequences == sum(one.num_sequences for one in kept)
        assert set(traces._by_client_id.values()) <= {one.request_id for one in kept}
    found = traces.find(requests[-1][1], "tenant") if requests else None
    assert found is None or found.request_id == f"r{len(requests) - 1}"


def record(request_id: str) -> Record:
    made = Record(request_id, 1, TokenIds.of((1, 2, 3)), SamplingParams(max_tokens=4), "tenant")
    made.timeline.mark(Event.ARRIVED, 5.0)
    made.timeline.mark(Event.RELEASED, 6.5)
    made.lost.append(EndedAttempt(1, "decode0", "", 2, "worker_lost"))
    made.path = PrefillPath("prefill0", 2, 1, 16, 48, 48)
    return made


def test_what_is_told_of_a_record_is_the_same_when_it_is_gone() -> None:
    traces = Traces()
    wide = trace(1, 3, "client")
    traces.add(wide)
    wide.records += [record(f"r1-{index}") for index in range(2)]
    before = msgspec.json.encode(wide.describe())
    for one in list(wide.records):
        assert isinstance(one, Record)
        traces.close(one)
        traces.close(one)
    assert msgspec.json.encode(wide.describe()) == before
    assert not any(isinstance(one, Record) for one in wide.records)


def test_records_of_which_nothing_is_kept_are_closed_in_silence() -> None:
    traces = Traces(max_traces=1)
    traces.add(trace(1, 1, "a"))
    for request_id in ("r1-0", "r2-0", "document-x", "bare"):
        traces.close(record(request_id))
    assert traces.find("r1", "tenant") is not None
