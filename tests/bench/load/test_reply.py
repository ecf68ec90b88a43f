"""Answers byte by byte: what counts as a token, and how an answer may end."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load.driving.client import Address
from bench.load.driving.reply import Reply
from protocol.errors import ConfigError

ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
TEXT = b'data: {"choices":[{"text":" a","finish_reason":null}],"usage":null}\n\n'
IDS = b'data: {"choices":[{"text":"","token_ids":[7,8],"finish_reason":"stop"}]}\n\n'
USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3,'
    b'"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
)
DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"


def _read(*pieces: bytes, status: int = 200, must_have: int | None = None) -> Reply:
    reply = Reply(keeps_answer=True)
    reply.take_head(status, {"x-request-id": "r", "x-baton-path": "p"}, 0.0)
    for number, piece in enumerate(pieces, 1):
        if reply.take_body(piece, float(number)):
            break
    reply.end(99.0)
    reply.settle_counts(must_have)
    return reply


def test_an_answer() -> None:
    one = b'data: {"choices":[{"text":" a","token_ids":[5]}]}\n\n'
    reply = _read(COMMENT, ROLE, one, IDS, USAGE, DONE)
    assert (reply.outcome, reply.finish_reason) == ("ok", "stop")
    assert (reply.times, reply.counts) == ([3.0, 4.0], [1, 2])
    assert (reply.num_prompt_tokens, reply.num_output_tokens, reply.num_cached_tokens) == (9, 3, 4)
    assert (reply.token_ids, "".join(reply.texts)) == ([5, 7, 8], " a")
    assert (reply.request_id, reply.path) == ("r", "p")


@given(st.lists(st.integers(1, 500), max_size=12), st.booleans())
def test_pieces_may_be_cut_anywhere(cuts: list[int], with_cr: bool) -> None:
    whole = COMMENT + ROLE + TEXT * 3 + USAGE + DONE
    if with_cr:
        whole = whole.replace(b"\n", b"\r\n")
    places = [0, *sorted(cut % len(whole) for cut in cuts), len(whole)]
    reply = _read(*(whole[a:b] for a, b in pairwise(places)))
    assert reply.outcome == "ok"
    assert reply.counts == [1, 1, 1]
    assert reply.num_output_tokens == 3


@pytest.mark.parametrize(
    "event",
    [
        ROLE,
        COMMENT,
        b'data: {"choices":[{"text":""}]}\n\n',
        b'data: {"choices":[{"text":"held back","token_ids":[]}]}\n\n',
        b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":1}}\n\n',
        b"event: ping\n\n",
    ],
)
def test_what_is_no_token(event: bytes) -> None:
    assert _read(event, DONE).times == []


@pytest.mark.parametrize(
    "delta",
    [
        b'"content":"x"',
        b'"reasoning_content":"x"',
        b'"reasoning":"x"',
        b'"tool_calls":[{"id":"1"}]',
    ],
)
def test_what_is_one(delta: bytes) -> None:
    assert len(_read(b'data: {"choices":[{"delta":{' + delta + b"}}]}\n\n", DONE).times) == 1


@pytest.mark.parametrize(
    ("pieces", "outcome", "code"),
    [
        ((TEXT, TEXT, TEXT), "disconnect", "no_end_marker"),
        ((DONE,), "incomplete", "no_tokens"),
        ((b"data: {broken\n\n", DONE), "incomplete", "malformed_event"),
        ((TEXT, b'data: {"error":{"code":"overloaded"}}\n\n'), "http_error", "overloaded"),
        ((TEXT, b'data: {"error":"overloaded"}\n\n'), "http_error", "overloaded"),
        ((TEXT, b'data: {"error":{"type":"server_error"}}\n\n'), "http_error", "server_error"),
        ((IDS, USAGE, DONE), "incomplete", "usage_says_3_not_2"),
        ((TEXT * 5, USAGE, DONE), "incomplete", "usage_says_3_of_5_events"),
    ],
)
def test_bad_ends(pieces: tuple[bytes, ...], outcome: str, code: str) -> None:
    reply = _read(*pieces)
    assert (reply.outcome, reply.error_code) == (outcome, code)


def test_forced_lengths_are_checked() -> None:
    assert _read(TEXT * 3, USAGE, DONE, must_have=3).outcome == "ok"
    short = _read(TEXT * 3, USAGE, DONE, must_have=4)
    assert (short.outcome, short.error_code) == ("incomplete", "3_of_4_tokens")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"error":{"message":"full","code":"shed"}}', "shed"),
        (b'{"error":{"message":"full","code":429}}', "429"),
        (b"<html>", "http_429"),
        (b"", "http_429"),
    ],
)
def test_a_status_is_an_error(body: bytes, code: str) -> None:
    reply = _read(body, status=429)
    assert (reply.outcome, reply.status, reply.error_code) == ("http_error", 429, code)


def test_running_usage_counts_tokens() -> None:
    def event(num: int) -> bytes:
        return b'data: {"choices":[{"text":"x"}],"usage":{"completion_tokens":%d}}\n\n' % num

    reply = _read(event(1), event(4), event(5), DONE)
    assert (reply.counts, reply.outcome) == ([1, 3, 1], "ok")


def test_an_end_without_text_leaves_the_counts_known() -> None:
    stop = b'data: {"choices":[{"text":"","finish_reason":"stop"}]}\n\n'
    reply = _read(TEXT, TEXT, stop, USAGE, DONE)  # two texts, three tokens: the last one ended it
    assert (reply.counts, reply.num_output_tokens) == ([1, 1], 3)
    assert _read(TEXT, USAGE, DONE).counts == []  # three tokens in one text: nobody knows


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://a:8000", Address("a", 8000, "", False)),
        ("http://a:8000/v1/", Address("a", 8000, "", False)),
        ("https://a/b/v1", Address("a", 443, "/b", True)),
        ("127.0.0.1:80", Address("127.0.0.1", 80, "", False)),
        ("http://[::1]:8", Address("::1", 8, "", False)),
    ],
)
def test_addresses(url: str, address: Address) -> None:
    assert Address.parse(url) == address


@pytest.mark.parametrize("url", ["", "ftp://a", "http://", "http://a:b", "http://a:99999"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError):
        Address.parse(url)
