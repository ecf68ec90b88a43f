"""What both clients share: the event parser, the calls, the attempts. No server."""

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton_client import calls
from baton_client.calls import Call, path_of
from baton_client.errors import (
    STATUS_BY_CODE,
    BatonAPIError,
    BatonConnectionError,
    ErrorInfo,
    InvalidCall,
    WaitTimeout,
    api_error,
)
from baton_client.exchange import Attempts, Deadline, Retry, request_fields
from baton_client.reading import Outcome, read_answer, read_document_event, read_progress
from baton_client.sse import Comment, EventParser, ServerEvent
from coordinator import errors
from coordinator.http.answers import sse
from protocol.errors import RequestError

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
    first, *events, last = _feed(stream, cuts)
    assert (first, last) == (Comment("hello"), Comment("prefill 1/2"))
    assert events == [ServerEvent(msgspec.json.encode({"text": text}), "state") for text in texts]


def test_lines_of_data_are_joined_and_half_an_event_is_none() -> None:
    parser = EventParser()
    assert parser.feed(b"data: a\ndata:b\nunknown: c\n\ndata: half") == [ServerEvent(b"a\nb")]
    assert parser.feed(b"\n") == []
    assert parser.feed(b"event: x\n\n") == [ServerEvent(b"half", "x")]
    assert parser.feed(b"event: nothing\n\n") == []


def test_an_event_without_an_end_is_refused() -> None:
    parser = EventParser(max_bytes=100)
    assert parser.feed(b"data: " + b"x" * 60 + b"\n") == []
    with pytest.raises(BatonConnectionError, match="more than 100 bytes"):
        parser.feed(b"x" * 60)


def _data(chunk: bytes) -> bytes:
    return chunk.removeprefix(b"data: ").strip()


def _chunk(text: str, **more: object) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return _data(sse.event({"id": "c1", "choices": [choice], **more}))


def test_an_outcome_is_what_has_come() -> None:
    outcome = Outcome(9.0, "r1", "local")
    usage = {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 3}}
    last = _data(sse.event({"id": "c1", "choices": [], "usage": usage}))
    for at, data in ((10.0, _chunk("")), (11.0, _chunk("a")), (12.0, last)):
        outcome.take(read_answer(data), at)
    assert (outcome.first_token_s, outcome.total_s, outcome.answer_id) == (2.0, 3.0, "c1")
    assert outcome.usage is not None
    assert (outcome.usage.cached_tokens, outcome.usage.computed_tokens) == (3, 4)


def test_progress_is_told_by_comments() -> None:
    (told, silent) = EventParser().feed(sse.keep_alive((3, 7)) + sse.keep_alive(None))
    assert isinstance(told, Comment) and isinstance(silent, Comment)
    assert (read_progress(told), read_progress(silent)) == ((3, 7), None)


def test_an_error_in_a_stream_keeps_its_code() -> None:
    frame = sse.error_event(RequestError("gone", code="worker_lost", status=503))
    for read in (read_answer, lambda data: read_document_event(ServerEvent(data))):
        with pytest.raises(BatonAPIError) as caught:
            read(_data(frame))
        assert (caught.value.code, caught.value.status) == ("worker_lost", 503)
    assert STATUS_BY_CODE == errors.STATUS_BY_CODE


@pytest.mark.parametrize("data", [b"{}", b"nonsense", b"[]", b'{"id": "\xff"}'])
def test_what_is_no_answer_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(BatonConnectionError):
        read_answer(data)
    with pytest.raises(BatonConnectionError):
        read_document_event(ServerEvent(data))


# -- calls -----------------------------------------------------------------------------------------


def test_a_document_is_made_of_one_thing() -> None:
    with pytest.raises(InvalidCall):
        calls.create_document({})
    with pytest.raises(InvalidCall):
        calls.create_document({"text": "a", "file_id": "file-1"})
    with pytest.raises(InvalidCall, match="pin"):
        calls.create_document({"text": "a", "ttl": "2h"})
    call = calls.create_document(
        {"text": "", "name": "n", "pin": "soft", "ttl": 60.0, "cp": 2, "idempotency_key": "k"}
    )
    assert call.body == {
        "source": {"text": ""}, "display_name": "n", "pin": {"mode": "soft", "ttl": 60.0}, "cp": 2
    }  # fmt: skip
    assert call.headers == {"idempotency-key": "k"}
    assert call.is_repeatable


def test_only_what_cannot_take_effect_twice_is_repeatable() -> None:
    assert calls.get("/v1/files").is_repeatable
    assert not calls.chat([], {}, stream=False).is_repeatable
    assert not calls.create_batch("file-1", "/v1/documents", None, "24h", None).is_repeatable
    assert calls.create_batch("file-1", "/v1/documents", None, "24h", "k").is_repeatable
    with open(__file__, "rb") as file:
        assert not calls.create_document({"file": file}).is_repeatable
        assert calls.create_document({"file": file}).upload is not None
    assert calls.create_document({"file": __file__}).is_repeatable


@settings(deadline=None, max_examples=50)
@given(st.text(min_size=1) | st.sampled_from([".", "..", "a/../b", "?a", "#a", "%2e", "\ud800"]))
def test_an_id_stays_in_its_place(document_id: str) -> None:
    try:
        call = Call("GET", path_of("documents", document_id, "events"))
    except InvalidCall:
        assert document_id in (".", "..")
        return
    assert call.path.count("/") == 4
    fields = request_fields(call, None, Deadline(9.0, "it"), stream=False)
    sent = http.build_request(**fields)
    assert sent.url.raw_path.decode() == call.path


def test_errors_of_other_servers_are_shown_shortened() -> None:
    error = api_error(502, b"<html>\n" + b"bad gateway " * 99, None, "soon")
    assert (error.status, error.retry_after, error.is_temporary) == (502, None, True)
    assert error.message.startswith("<html> bad gateway")
    assert len(error.message) <= 300


# -- attempts --------------------------------------------------------------------------------------


def _failures(attempts: Attempts, error: BatonAPIError) -> list[float]:
    """The pauses until ``error`` is final."""
    pauses: list[float] = []
    with pytest.raises(BatonAPIError):
        while True:
            pauses.append(attempts.pause_s(error))
    return pauses


@given(max_attempts=st.integers(1, 40))
def test_pauses_grow_and_stay_bounded(max_attempts: int) -> None:
    retry = Retry(max_attempts)
    long = Deadline(1e9, "it")
    pauses = _failures(Attempts(retry, long), TEMPORARY)
    assert len(pauses) == max_attempts - 1
    assert all(0 < pause_s <= retry.max_delay_s for pause_s in pauses)
    asked = BatonAPIError(429, ErrorInfo("slower"), retry_after=5.0)
    pauses = _failures(Attempts(retry, long), asked)
    assert all(5.0 <= pause_s <= retry.max_delay_s for pause_s in pauses)
    assert not _failures(Attempts(retry, long), FINAL)
    assert not _failures(Attempts(retry, long, is_repeatable=False), TEMPORARY)


def test_a_server_that_has_answered_is_waited_for_until_the_deadline() -> None:
    now = [0.0]
    attempts = Attempts(Retry(max_attempts=2), Deadline(100.0, "the wait", lambda: now[0]))
    lost = BatonConnectionError("no server")
    assert attempts.pause_s(lost) > 0
    with pytest.raises(BatonConnectionError):
        attempts.pause_s(lost)
    attempts.answered()
    for _ in range(50):
        assert attempts.pause_s(lost) > 0
    now[0] = 99.9
    with pytest.raises(WaitTimeout, match="the wait: not done after 100 s"):
        attempts.pause_s(lost)
    with pytest.raises(BatonAPIError):
        attempts.pause_s(FINAL)
