"""What is kept of the latest requests is bounded, however wide they are, and small."""

import random

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from coordinator.request import EndedAttempt, Request
from coordinator.requests.traces import Trace, Traces
from protocol.request import PrefillPath, SamplingParams
from protocol.timeline import TimelineEvent
from protocol.token_ids import TokenIds


def trace(number: int, num_sequences: int, client_id: str) -> Trace:
    return Trace(f"r{number}", client_id, "tenant", "model", 0, num_sequences)


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.sampled_from("abc"), st.sampled_from(["tenant", "other"])),
        max_size=12,
    ),
    st.randoms(use_true_random=False),
)
def test_the_latest_are_kept_as_far_as_there_is_room(
    requests: list[tuple[int, str, str]], chance: random.Random
) -> None:
    """Whether they have ended or not, and in whatever order they end."""
    traces, kept = Traces(max_traces=4, max_sequences=12), list[Trace]()
    for number, (num_sequences, client_id, tenant) in enumerate(requests):
        added = Trace(f"r{number}", client_id, tenant, "model", 0, num_sequences)
        traces.add(added)
        added.requests += [request(f"r{number}-{index}") for index in range(num_sequences)]
        kept.append(added)
        while len(kept) > 4 or (sum(one.num_sequences for one in kept) > 12 and len(kept) > 1):
            kept.pop(0)
        ending = [one for trace in kept for one in trace.requests if isinstance(one, Request)]
        for one in chance.sample(ending, chance.randint(0, len(ending))):
            traces.close(one)
        assert len(traces) == len(kept)
        for trace in kept:
            told = msgspec.json.encode(trace.describe())
            assert traces.find(trace.request_id, trace.tenant) == told
            assert traces.find(f"cmpl-{trace.request_id}-0", trace.tenant) == told
            assert traces.find(trace.request_id, "a third") is None
        latest = {(trace.tenant, trace.client_request_id): trace for trace in kept}
        for (owner, name), trace in latest.items():
            assert traces.find(name, owner) == msgspec.json.encode(trace.describe())
        gone = {f"r{earlier}" for earlier in range(number)} - {one.request_id for one in kept}
        assert not any(traces.find(request_id, "tenant") for request_id in gone)


def request(request_id: str) -> Request:
    made = Request(
        request_id=request_id,
        prompt_token_ids=TokenIds.of((1, 2, 3)),
        sampling=SamplingParams(max_tokens=4),
        tenant="tenant",
    )
    made.timeline.mark(TimelineEvent.ARRIVED, 5.0)
    made.timeline.mark(TimelineEvent.RELEASED, 6.5)
    made.lost.append(EndedAttempt(1, "decode0", "", 2, "worker_lost"))
    made.path = PrefillPath("prefill0", 2, 1, 16, 48, 48)
    return made


def test_what_is_told_of_a_record_is_the_same_when_it_is_gone() -> None:
    traces = Traces()
    wide = trace(1, 3, "client")
    traces.add(wide)
    wide.requests += [request(f"r1-{index}") for index in range(2)]
    before = msgspec.json.encode(wide.describe())
    for one in list(wide.requests):
        assert isinstance(one, Request)
        traces.close(one)
        traces.close(one)
    assert msgspec.json.encode(wide.describe()) == before
    assert not any(isinstance(one, Request) for one in wide.requests)


def test_records_of_which_nothing_is_kept_are_closed_in_silence() -> None:
    traces = Traces(max_traces=1)
    traces.add(trace(1, 1, "a"))
    for request_id in ("r1-0", "r2-0", "document-x", "bare"):
        traces.close(request(request_id))
    assert traces.find("r1", "tenant") is not None
