"""A server whose every delay is known: what a harness says about it is right or wrong.

    python -m tests.bench.toy_server [CONFIG] [--tls FILE]

``CONFIG`` is a ``ToyConfig`` in JSON. It computes nothing. Of a request with n prompt tokens the
first token leaves ``base + prefill * n`` after its turn has come, each later event ``token_s``
after the one before. With slots, requests take turns, first come, first served. In a stall the
whole server stands still. Failures are drawn from the seed and the request's number. ``GET
/toy/log`` tells when everything really left; ``/toy/restart`` counts stalls and draws from then on.
"""

import argparse
import asyncio
import contextlib
import heapq
import itertools
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast

import httptools
import msgspec
import uvloop

from bench.load.driving.pacer import Pacer

Stall = tuple[float, float]  # (from, seconds)

_PLAIN_FIELDS = frozenset(
    ("model", "prompt", "messages", "max_tokens", "temperature", "stream", "stream_options")
)


class ToyConfig(msgspec.Struct, frozen=True):
    """What it does. Rates are shares of the requests."""

    base_s: float = 0.02
    prefill_s_per_1k: float = 0.05
    token_s: float = 0.01
    tokens_per_event: int = 1
    num_slots: int = 0
    """0: as many as there are requests. A request holds its slot for its whole planned time."""
    stalls: tuple[Stall, ...] = ()
    """(seconds after the server's start or restart, seconds)."""
    failure_rate: float = 0.0
    """Answered with status 500 at once."""
    error_rate: float = 0.0
    """An error inside the stream, after half of the tokens."""
    disconnect_rate: float = 0.0
    """The connection is closed after half of the tokens."""
    early_role: bool = False
    """Chat: sends the role at once, which some harnesses take for the first token."""
    is_strict: bool = False
    """Refuses fields that are not OpenAI's."""
    seed: int = 0

    def prefill_s(self, num_prompt_tokens: int) -> float:
        return self.base_s + self.prefill_s_per_1k * num_prompt_tokens / 1000


def advance(start: float, duration_s: float, stalls: Sequence[Stall]) -> float:
    """When ``duration_s`` of work that is taken up at ``start`` are done, given the stalls."""
    now, left_s = start, duration_s
    for begin, length_s in sorted(stalls):
        end = begin + length_s
        if begin <= now < end:
            now = end
        elif now < begin < now + left_s:
            left_s -= begin - now
            now = end
    return now + left_s


class _Body(msgspec.Struct):
    prompt: list[int] | str | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: int = 16
    return_token_ids: bool = False


@dataclass(slots=True)
class Served:
    """One request, for the log. Times are of CLOCK_MONOTONIC."""

    request_id: str
    arrived: float
    num_prompt_tokens: int
    due: list[float] = field(default_factory=list)
    left: list[float] = field(default_factory=list)
    fate: str = "ok"


class ToyServer:
    """The service without the sockets' side."""

    def __init__(self, config: ToyConfig) -> None:
        self.config = config
        self.pacer = Pacer()
        self.log: list[Served] = []
        self.stalls: list[Stall] = []
        self._slots: list[float] = []
        self.restart()

    def restart(self) -> None:
        """Count stalls, slots and draws from now on, as a server does that has just come up."""
        now = time.monotonic()
        self.stalls = [(now + at, length_s) for at, length_s in self.config.stalls]
        self.log = []
        self._slots = [0.0] * self.config.num_slots

    async def listen(self, tls: ssl.SSLContext | None = None) -> asyncio.Server:
        return await asyncio.get_running_loop().create_server(
            lambda: _ToyConnection(self), "127.0.0.1", 0, backlog=4096, ssl=tls
        )

    def admit(self, request_id: str, num_prompt_tokens: int, num_output_tokens: int) -> Served:
        """Decide everything about a request that has just arrived."""
        config, now = self.config, time.monotonic()
        served = Served(request_id, now, num_prompt_tokens)
        draw = Random(f"{config.seed}/{len(self.log)}").random()
        for fate in ("failure", "error", "disconnect"):
            draw -= getattr(config, f"{fate}_rate")
            if draw < 0:
                served.fate = fate
                break
        self.log.append(served)
        if served.fate == "failure":
            return served
        begin = max(now, heapq.heappop(self._slots)) if config.num_slots else now
        due = advance(begin, config.prefill_s(num_prompt_tokens), self.stalls)
        num_events = -(-num_output_tokens // config.tokens_per_event)
        for _ in range(num_events):
            served.due.append(due)
            due = advance(due, config.token_s, self.stalls)
        if config.num_slots:
            heapq.heappush(self._slots, served.due[-1])
        if served.fate != "ok":
            del served.due[max(1, num_events // 2) :]
        return served

    def close(self) -> None:
        self.pacer.close()


def _chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _event(fields: dict[str, Any]) -> bytes:
    return _chunked(b"data: " + msgspec.json.encode(fields) + b"\n\n")


class _ToyConnection(asyncio.Protocol):
    """HTTP/1.1, one request at a time."""

    def __init__(self, server: ToyServer) -> None:
        self.server = server
        self.is_gone = False
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._url = b""
        self._request_id = ""
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has no such base

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        self.is_gone = True

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def on_message_begin(self) -> None:
        self._url, self._request_id, self._body = b"", "", []

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-request-id":
            self._request_id = value.decode("latin-1")

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        path = self._url.decode("latin-1")
        if path in ("/v1/completions", "/v1/chat/completions"):
            self._generate(b"".join(self._body), is_chat="chat" in path)
        elif path == "/v1/models":
            model = {"id": "toy", "object": "model", "owned_by": "baton", "root": "toy"}
            self._answer(200, {"object": "list", "data": [model]})
        elif path == "/toy/log":
            self._answer(200, self.server.log)
        elif path == "/toy/restart":
            self.server.restart()
            self._answer(200, {})
        elif path.startswith("/v1/requests/") and path.endswith("/timeline"):
            self._timeline(path.split("/")[3])
        else:
            self._answer(404, {"error": {"message": "no such path", "code": "not_found"}})

    def _generate(self, data: bytes, *, is_chat: bool) -> None:
        server, config = self.server, self.server.config
        try:
            body = msgspec.json.decode(data, type=_Body)
            unknown = set(msgspec.json.decode(data)) - _PLAIN_FIELDS if config.is_strict else set()
        except msgspec.DecodeError as error:
            self._answer(400, {"error": {"message": str(error), "code": "invalid_json"}})
            return
        if unknown:
            self._answer(400, {"error": {"message": f"{unknown}", "code": "unknown_field"}})
            return
        served = server.admit(self._request_id, _count(body), body.max_tokens)
        if served.fate == "failure":
            self._answer(500, {"error": {"message": "as drawn", "code": "toy_failure"}})
            return
        head = (
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
            f"x-request-id: {self._request_id}\r\n\r\n"
        )
        self.write(head.encode("latin-1"))
        if is_chat and config.early_role:
            self.write(_event({"choices": [{"index": 0, "delta": {"role": "assistant"}}]}))
        _Stream(self, served, body).start()

    def _timeline(self, request_id: str) -> None:
        found = [served for served in self.server.log if served.request_id == request_id]
        if not found:
            self._answer(404, {"error": {"message": "no such request", "code": "not_found"}})
            return
        events = {"arrived": 0.0}
        if found[-1].left:
            events["first_token"] = found[-1].left[0] - found[-1].arrived
            events["finished"] = found[-1].left[-1] - found[-1].arrived
        request = {"request_id": request_id, "state": "finished", "events": events}
        self._answer(200, {"object": "request.timeline", "requests": [request]})

    def _answer(self, status: int, content: object) -> None:
        body = msgspec.json.encode(content)
        head = (
            f"HTTP/1.1 {status} -\r\ncontent-type: application/json\r\n"
            f"x-request-id: {self._request_id}\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self.write(head.encode("latin-1") + body)

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self.is_gone:
            self._transport.write(data)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class _Stream:
    """The events of one answer, each at its instant."""

    def __init__(self, connection: _ToyConnection, served: Served, body: _Body) -> None:
        self._connection, self._server, self._served = connection, connection.server, served
        self._body, self._is_chat = body, body.messages is not None
        self._num_left = body.max_tokens
        self._events = itertools.count()
        self._usual = self._tokens(self._server.config.tokens_per_event, None)

    def start(self) -> None:
        self._server.pacer.at(self._served.due[0], self._emit)

    def _emit(self) -> None:
        connection, served = self._connection, self._served
        if connection.is_gone:
            return
        number, per_event = next(self._events), self._server.config.tokens_per_event
        served.left.append(time.monotonic())
        self._num_left -= per_event
        if number + 1 < len(served.due):
            connection.write(self._usual)
            self._server.pacer.at(served.due[number + 1], self._emit)
        elif served.fate == "disconnect":
            connection.write(self._usual)
            connection.close()
        elif served.fate == "error":
            error = {"message": "as drawn", "code": "toy_error"}
            connection.write(self._usual + _event({"error": error}) + b"0\r\n\r\n")
        else:
            connection.write(self._tokens(per_event + self._num_left, "length") + self._end())

    def _tokens(self, count: int, finish_reason: str | None) -> bytes:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
        text = " toy" * count
        choice |= {"delta": {"content": text}} if self._is_chat else {"text": text}
        if self._body.return_token_ids:
            choice["token_ids"] = [65] * count
        return _event({"id": "toy", "choices": [choice], "usage": None})

    def _end(self) -> bytes:
        num_prompt, num_output = self._served.num_prompt_tokens, self._body.max_tokens
        usage = {"prompt_tokens": num_prompt, "completion_tokens": num_output}
        usage["total_tokens"] = num_prompt + num_output
        return (
            _event({"id": "toy", "choices": [], "usage": usage})
            + _chunked(b"data: [DONE]\n\n")
            + b"0\r\n\r\n"
        )


def _count(body: _Body) -> int:
    """Prompt tokens: ids, or words."""
    if isinstance(body.prompt, list):
        return len(body.prompt)
    texts = [body.prompt or "", *(str(m.get("content", "")) for m in body.messages or [])]
    return sum(len(text.split()) for text in texts)


async def serve(config: ToyConfig, tls: ssl.SSLContext | None = None) -> None:
    """Listen on any free port until cancelled; says where on standard output."""
    server = ToyServer(config)
    listener = await server.listen(tls)
    scheme = "http" if tls is None else "https"
    print(f"ready {scheme}://127.0.0.1:{listener.sockets[0].getsockname()[1]}", flush=True)
    try:
        await listener.serve_forever()
    finally:
        server.close()


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(prog="tests.bench.toy_server")
    parser.add_argument("config", nargs="?", default="{}", help="a ToyConfig in JSON")
    parser.add_argument("--tls", help="speak HTTPS with the key and the certificates in this file")
    given = parser.parse_args()
    tls = None
    if given.tls is not None:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(given.tls)
    config = msgspec.json.decode(given.config, type=ToyConfig)
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(config, tls))


if __name__ == "__main__":
    main()
