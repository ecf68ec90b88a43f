"""What is kept of the latest requests is bounded, however wide they are."""

from hypothesis import given
from hypothesis import strategies as st

from coordinator.traces import Trace, Traces


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
