"""What arrives on the socket before it is a request: raw bytes in, and who is cut off when."""

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

BODY = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.fixture
def connect(cluster: Any) -> Iterator[Callable[[], socket.socket]]:
    """Opens connections; afterwards the server serves as ever."""
    host, port = cluster.url.removeprefix("http://").split(":")
    opened: list[socket.socket] = []

    def open_one() -> socket.socket:
        opened.append(socket.create_connection((host, int(port)), timeout=15))
        return opened[-1]

    yield open_one
    for connection in opened:
        connection.close()
    assert cluster.complete("x", max_tokens=1).status_code == 200


def answer(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    received = b""
    while data := connection.recv(1 << 16):
        received += data
    return received


def status(raw: bytes) -> int:
    return int(raw.split(b" ", 2)[1])


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (HEAD + b"Content-Length: -5\r\n\r\n", 400),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400),
        (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (HEAD + b"Content-Length: 99999999\r\n\r\n", 413),
        (HEAD + b"Content-Length: 99999999\r\nExpect: 100-continue\r\n\r\n", 413),
        (HEAD + b"Connection: close\r\n\r\n", 400),
        (HEAD + b"X-Big: " + b"a" * 5_000_000, 431),
        (HEAD + b"Connection: close\r\nX-Big: " + b"a" * 34_000 + b"\r\n\r\n", 431),
        (HEAD + b"Connection: close\r\n" + b"X-Many: a\r\n" * 200 + b"\r\n", 431),
        (HEAD + b'Content-Length: 50\r\n\r\n{"a"', 408),
        (HEAD, 408),
        (b"", 408),
    ],
    ids=lambda value: repr(value)[-30:],
)
def test_refused_and_closed(
    connect: Callable[[], socket.socket], sent: bytes, expected: int
) -> None:
    connection = connect()
    try:
        connection.sendall(sent)
        raw = answer(connection)
    except ConnectionError:  # it was closed while we still sent: that, too, is a refusal
        assert expected == 431
        return
    assert status(raw) == expected
    assert b"100 Continue" not in raw


def test_a_chunked_body_is_cut_off_when_it_crosses_the_limit(
    connect: Callable[[], socket.socket],
) -> None:
    connection = connect()
    connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    try:
        for _ in range(32):
            connection.sendall(chunk)
        raw = answer(connection)
    except ConnectionError:
        return
    assert status(raw) == 413


def test_keep_alive_and_pipelining(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    one = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    last = one.replace(b"Host: 127.0.0.1", b"Host: 127.0.0.1\r\nConnection: close")
    connection.sendall(one + one + last)
    assert answer(connection).count(b"HTTP/1.1 200") == 3


def test_half_a_body_and_away(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.sendall(HEAD + b"Content-Length: 50\r\n\r\n{}")
    connection.shutdown(socket.SHUT_WR)
    assert answer(connection) == b""


@pytest.mark.parametrize(
    "target", [b"/v1/%2e%2e/metrics", b"/v1/../metrics", b"//metrics", b"/a%00b", b"/%0d%0aX: y"]
)
def test_odd_paths_lead_nowhere(connect: Callable[[], socket.socket], target: bytes) -> None:
    connection = connect()
    connection.sendall(b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % target)
    assert status(answer(connection)) in (400, 404)
