"""Where a body ends is beyond doubt, or the connection does."""

import json
import socket
import urllib.parse
from typing import Any

import pytest

BODY = json.dumps({"prompt": [1, 2, 3], "max_tokens": 1}).encode()
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
SECOND = b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
DEADLINE_S = 20.0


def exchange(url: str, request: bytes) -> bytes:
    """Everything that comes back until the connection is closed."""
    address = urllib.parse.urlsplit(url)
    with socket.create_connection((address.hostname, address.port), DEADLINE_S) as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


def head(*lines: str, version: str = "1.1") -> bytes:
    fixed = (
        f"POST /v1/completions HTTP/{version}",
        "Host: [::1]",
        "Content-Type: application/json",
    )
    return "\r\n".join([*fixed, *lines]).encode() + b"\r\n\r\n"


@pytest.mark.parametrize(
    "lines",
    [
        ("Transfer-Encoding: gzip, chunked",),
        ("Transfer-Encoding: gzip", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: identity, chunked",),
        ("Transfer-Encoding: ,chunked",),
        ("Transfer-Encoding: x\tchunked",),
    ],
)
def test_other_codings_are_not_implemented(cluster: Any, lines: tuple[str, ...]) -> None:
    answer = exchange(cluster.url, head(*lines) + CHUNKED + SECOND)
    assert answer.startswith(b"HTTP/1.1 501 ")
    assert b"connection: close" in answer
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "unsupported_transfer_encoding"


@pytest.mark.parametrize(
    "lines",
    [
        ("Transfer-Encoding: chunked, gzip",),
        ("Transfer-Encoding: chunked, chunked",),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: identity",),
        ("Transfer-Encoding: xchunked",),
        ("Transfer-Encoding:",),
        ("Transfer-Encoding: chunked", f"Content-Length: {len(CHUNKED)}"),
        (f"Content-Length: {len(CHUNKED)}", "Transfer-Encoding: chunked"),
        (f"Content-Length: {len(BODY)}", f"Content-Length: {len(BODY) + 1}"),
        ("Content-Length: +5",),
        ("Content-Length: 5, 5",),
        ("Transfer-Encoding : chunked",),
    ],
)
def test_a_length_in_doubt_ends_the_connection(cluster: Any, lines: tuple[str, ...]) -> None:
    answer = exchange(cluster.url, head(*lines) + CHUNKED + SECOND)
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 ")), answer
    assert answer.count(b"HTTP/1.1") == 1, "what came behind it is no request"
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]


def test_an_old_version_has_no_chunks(cluster: Any) -> None:
    request = head("Transfer-Encoding: chunked", version="1.0") + CHUNKED
    assert exchange(cluster.url, request).startswith((b"HTTP/1.1 501 ", b"HTTP/1.1 400 "))


@pytest.mark.parametrize("coding", ["chunked", "Chunked", " chunked "])
def test_plain_chunks_are_served(cluster: Any, coding: str) -> None:
    answer = exchange(cluster.url, head(f"Transfer-Encoding:{coding}") + CHUNKED + SECOND)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1 200 ") == 2
