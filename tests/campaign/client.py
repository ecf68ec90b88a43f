"""One streamed completion over HTTP, by hand: who injects faults must know what a socket saw.

A stream ends in one of these ways, and nothing else is allowed: ``done`` (its end marker came),
``left`` (we went away), ``error CODE`` (an event or a status said so), ``cut`` (the connection
ended without a word, as it does when the coordinator is killed), ``refused`` (nobody listened),
``late`` (our patience ended).
"""

import asyncio
import random
import uuid
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tests.campaign.oracle import Prompt

Address = tuple[str, int]
_DATA, _DONE = b"data: ", b"[DONE]"
_MAX_LINE = 1 << 20


@dataclass(frozen=True, slots=True)
class Leave:
    """When a client goes away: so long after it has sent its request, or after so many tokens."""

    after_s: float | None = None
    after_tokens: int | None = None
    is_reset: bool = False  # the connection is reset, not closed


@dataclass(slots=True)
class Stream:
    """What one request has brought. Times are of this process's monotonic clock."""

    prompt: Prompt
    max_tokens: int
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    tokens: list[int] = field(default_factory=list)
    end: str = ""
    sent: float = 0.0
    ended: float = 0.0

    @property
    def is_lost(self) -> bool:
        """Whether it ended although nobody wanted it to."""
        return self.end not in ("done", "left")


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None


class _Error(msgspec.Struct):
    code: str | None = None
    message: str = ""


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    error: _Error | None = None


_CHUNK = msgspec.json.Decoder(_Chunk)


async def run_stream(
    address: Address,
    stream: Stream,
    *,
    salt: str | None,
    leave: Leave | None = None,
    patience_s: float = 60.0,
) -> Stream:
    """Send ``stream``'s request and follow it to its end, whatever that is."""
    loop = asyncio.get_running_loop()
    stream.sent = loop.time()
    leave_at = None if leave is None or leave.after_s is None else stream.sent + leave.after_s
    until = stream.sent + patience_s if leave_at is None else leave_at
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout_at(until):
            reader, writer = await asyncio.open_connection(*address, limit=_MAX_LINE)
            writer.write(_request(stream, salt))
            stream.end = await _follow(reader, stream, leave.after_tokens if leave else None)
    except TimeoutError:
        stream.end = "late" if leave_at is None else "left"
    except (OSError, EOFError):
        stream.end = "refused" if writer is None else "cut"
    finally:
        stream.ended = loop.time()
        if writer is not None and leave is not None and leave.is_reset:
            writer.transport.abort()
        elif writer is not None:
            writer.close()
    return stream


def _request(stream: Stream, salt: str | None) -> bytes:
    fields: dict[str, Any] = {
        "prompt": stream.prompt.token_ids,
        "max_tokens": stream.max_tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    if salt is not None:
        fields["cache_salt"] = salt
    return _head("POST", "/v1/completions", stream.request_id, msgspec.json.encode(fields))


def _head(method: str, path: str, request_id: str, body: bytes = b"") -> bytes:
    head = (
        f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        f"x-request-id: {request_id}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _follow(reader: asyncio.StreamReader, stream: Stream, stop_after: int | None) -> str:
    """How it ended. Events are never cut in two, so the lines of the framing can be passed over."""
    while line := await reader.readline():
        if line.startswith(b"{"):  # a plain error with a status
            error = _CHUNK.decode(line).error
        elif not line.startswith(_DATA):
            continue
        elif line.startswith(_DONE, len(_DATA)):
            return "done"
        else:
            chunk = _CHUNK.decode(line[len(_DATA) :])
            for choice in chunk.choices:
                stream.tokens += choice.token_ids or ()
            error = chunk.error
        if error is not None:
            return f"error {error.code}"
        if stop_after is not None and len(stream.tokens) >= stop_after:
            return "left"
    return "cut"


async def get_json(address: Address, path: str, timeout_s: float = 10.0) -> dict[str, Any] | None:
    """What a GET answers, or None when nobody does, or not with 200."""
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(_head("GET", path, uuid.uuid4().hex))
            answer = await reader.read()
    except (OSError, TimeoutError):
        return None
    finally:
        if writer is not None:
            writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0] + b" ":
        return None
    decoded: dict[str, Any] = msgspec.json.decode(body)
    return decoded


def draw_leave(rng: random.Random, max_tokens: int) -> Leave:
    """A moment to go away, in any phase of a request's life."""
    is_reset = rng.random() < 0.5
    match rng.randrange(4):
        case 0:
            return Leave(after_s=rng.uniform(0.0, 0.01), is_reset=is_reset)
        case 1:
            return Leave(after_s=rng.uniform(0.01, 0.15), is_reset=is_reset)
        case 2:
            return Leave(after_tokens=1, is_reset=is_reset)
        case _:
            return Leave(after_tokens=rng.randint(2, max(2, max_tokens)), is_reset=is_reset)
