"""What the clients share: the event reader, the calls, the budgets. No server."""

from random import Random

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.client import requests
from coordinator.client.budget import Budget, Patience, Retry
from coordinator.client.errors import (
    BatonAPIError,
    BatonConnectionError,
    ErrorInfo,
    WaitTimeout,
    api_error,
)
from coordinator.client.exchange import request_fields
from coordinator.client.following import Following
from coordinator.client.reading import Reading
from coordinator.client.requests import Call, path_of
from coordinator.client.sse import Comment, EventParser, ServerEvent
from coordinator.client.types import ChatChunk
from coordinator.http.answers import sse
from protocol.errors import ConfigError, RequestError

http = httpx.Client(base_url="http://host", verify=False)
TEMPORARY = BatonAPIError(503, ErrorInfo("not now", "overloaded"))
FINAL = BatonAPIError(400, ErrorInfo("never", "invalid_value"))


def _feed(data: bytes, cuts: list[int]) -> list[ServerEvent | Comment]:
    parser, found, last = EventParser(), [], 0
    for cut in [*sorted(cuts), len(data)]:
        found += parser.feed(data[last:cut])
        last = cut
    return found


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(max_size=5), max_size=4),
    end=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    data=st.data(),
)
def test_events_are_the_same_however_they_are_cut(
    texts: list[str], end: bytes, data: st.DataObject
) -> None:
    stream = b"\xef\xbb\xbf: hello\n\n"
    stream += b"".join(b"id: 7\nevent: state\n" + sse.event({"text": text}) for text in texts)
    stream = (stream + sse.keep_alive((1, 2))).replace(b"\n", end)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    first, *events, last = _feed(stream + b"x", cuts)  # a CR is a line's end once something follows
    assert (first, last) == (Comment("hello"), Comment("prefill 1/2"))
    assert events == [
        ServerEvent(msgspec.json.encode({"text": text}).decode(), "state", "7") for text in texts
    ]


def test_lines_of_data_are_joined_and_half_an_event_is_none() -> None:
    parser = EventParser()
    assert parser.feed(b"data: a\ndata:b\nunknown: c\n\ndata: half") == [ServerEvent("a\nb")]
    assert parser.feed(b"\n") == []
    assert parser.feed(b"event: x\n\n") == [ServerEvent("half", "x")]
    assert parser.feed(b"event: nothing\n\n") == []


def test_an_event_without_an_end_is_refused() -> None:
    parser = EventParser(max_bytes=100)
    assert parser.feed(b"data: " + b"x" * 60 + b"\n") == []
    with pytest.raises(BatonConnectionError, match="more than 100 bytes"):
        parser.feed(b"x" * 60)


def _chunk(text: str, **more: object) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return sse.event({"id": "c1", "choices": [choice], **more})


def test_an_answer_is_read_to_its_end() -> None:
    now, seen = [10.0], []
    reading = Reading(ChatChunk, 9.0, lambda: now[0], lambda *counts: seen.append(counts))
    reading.begin("r1", "local")
    assert reading.feed(sse.keep_alive((3, 7)) + sse.keep_alive(None)) == []
    now[0] = 11.0
    chunks = reading.feed(_chunk("") + _chunk("a"))
    assert [chunk.text for chunk in chunks] == ["", "a"]
    now[0] = 12.0
    usage = {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 3}}
    with pytest.raises(BatonConnectionError, match="broke off"):
        reading.end()
    reading.feed(sse.event({"id": "c1", "choices": [], "usage": usage}) + sse.DONE)
    reading.end()
    outcome = reading.outcome
    assert (outcome.first_token_s, outcome.total_s, outcome.path) == (2.0, 3.0, "local")
    assert outcome.usage is not None
    assert (outcome.usage.cached_tokens, outcome.usage.computed_tokens) == (3, 4)
    assert seen == [(3, 7)]


def test_an_error_in_a_stream_keeps_its_code() -> None:
    reading = Reading(ChatChunk, 0.0, lambda: 0.0)
    frame = sse.error_event(RequestError("gone", code="worker_lost", status=503))
    with pytest.raises(BatonAPIError) as caught:
        reading.feed(_chunk("a") + frame)
    assert (caught.value.code, caught.value.status) == ("worker_lost", 503)


@pytest.mark.parametrize("data", [b"data: {}\n\n", b"data: nonsense\n\n", b"data: []\n\n"])
def test_what_is_no_answer_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(BatonConnectionError):
        Reading(ChatChunk, 0.0, lambda: 0.0).feed(data)
    with pytest.raises(BatonConnectionError):
        Following("doc_1", 0).feed(data)


@settings(deadline=None)
@given(st.lists(st.integers(1, 6), max_size=12), st.integers(0, 3))
def test_no_event_is_given_twice(numbers: list[int], after: int) -> None:
    following = Following("doc_1", after)
    assert following.call().query == {"starting_after": str(after)}
    frames = b"".join(
        b"event: progress\n" + sse.event({"sequence_number": n, "odd": n}) for n in numbers
    )
    found = [event.sequence_number for event in following.feed(frames)]
    assert found == sorted(set(found))
    assert all(number > after for number in found)
    assert following.call().query == {"starting_after": str(max([after, *found]))}


# -- calls -----------------------------------------------------------------------------------------


def test_a_document_is_made_of_one_thing() -> None:
    with pytest.raises(ConfigError):
        requests.create_document({})
    with pytest.raises(ConfigError):
        requests.create_document({"text": "a", "file_id": "file-1"})
    with pytest.raises(ConfigError, match="pin"):
        requests.create_document({"text": "a", "ttl": "2h"})
    call = requests.create_document(
        {"text": "", "name": "n", "pin": "soft", "ttl": 60.0, "cp": 2, "idempotency_key": "k"}
    )
    assert call.body == {
        "source": {"text": ""}, "display_name": "n", "pin": {"mode": "soft", "ttl": 60.0}, "cp": 2
    }  # fmt: skip
    assert call.headers == {"idempotency-key": "k"}
    assert call.is_repeatable


def test_only_what_cannot_take_effect_twice_is_repeatable() -> None:
    assert requests.get("/v1/files").is_repeatable
    assert not requests.chat([], {}, stream=False).is_repeatable
    assert not requests.create_batch("file-1", "/v1/documents", None, "24h", None).is_repeatable
    assert requests.create_batch("file-1", "/v1/documents", None, "24h", "k").is_repeatable
    with open(__file__, "rb") as file:
        assert not requests.create_document({"file": file}).is_repeatable
        assert requests.create_document({"file": file}).upload is not None
    assert requests.create_document({"file": __file__}).is_repeatable


@settings(deadline=None, max_examples=50)
@given(st.text(min_size=1) | st.sampled_from([".", "..", "a/../b", "?a", "#a", "%2e", "\ud800"]))
def test_an_id_stays_in_its_place(document_id: str) -> None:
    try:
        call = Call("GET", path_of("documents", document_id, "events"))
    except ConfigError:
        assert document_id in (".", "..")
        return
    assert call.path.count("/") == 4
    fields = request_fields(call, None, Budget(9.0, "it"))
    sent = http.build_request(**fields)
    assert sent.url.raw_path.decode() == call.path


def test_errors_of_other_servers_are_shown_shortened() -> None:
    error = api_error(502, b"<html>\n" + b"bad gateway " * 99, None, "soon")
    assert (error.status, error.retry_after, error.is_temporary) == (502, None, True)
    assert error.message.startswith("<html> bad gateway")
    assert len(error.message) <= 300


# -- budgets ---------------------------------------------------------------------------------------


@given(number=st.integers(1, 10_000), seed=st.integers())
def test_pauses_grow_and_stay_bounded(number: int, seed: int) -> None:
    retry, random = Retry(max_attempts=3), Random(seed)
    delay = retry.delay_s(number, TEMPORARY, random)
    assert (delay is None) == (number >= 3)
    assert 0 < retry.pause_s(number, TEMPORARY, random) <= retry.max_delay_s
    assert retry.delay_s(number, FINAL, random) is None
    asked = BatonAPIError(429, ErrorInfo("slower"), retry_after=5.0)
    assert 5.0 <= retry.pause_s(number, asked, random) <= retry.max_delay_s


def test_a_server_that_has_answered_is_waited_for_as_long_as_the_budget_lasts() -> None:
    now = [0.0]
    budget = Budget(100.0, "the wait", lambda: now[0])
    patience = Patience(Retry(max_attempts=2), budget, Random(0))
    lost = BatonConnectionError("no server")
    assert patience.delay_s(lost) > 0
    with pytest.raises(BatonConnectionError):
        patience.delay_s(lost)
    patience.answered()
    for _ in range(50):
        assert patience.delay_s(lost) > 0
    now[0] = 99.9
    with pytest.raises(WaitTimeout, match="the wait: not done after 100 s"):
        patience.delay_s(lost)
    with pytest.raises(BatonAPIError):
        patience.delay_s(FINAL)
