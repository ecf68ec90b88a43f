"""Thousands of requests at once over plain sockets, each followed to its end.

An outcome is ``ok``, the error's ``STATUS code`` (of a status or of an event in a stream), ``cut``
(the connection ended without an end), ``refused`` (no connection), ``left`` (we went away as we had
meant to) or ``late`` (our patience ended).
"""

import asyncio
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

Address = tuple[str, int]
_DATA, _DONE = b"data: ", b"data: [DONE]"
_MAX_LINE = 1 << 26


class _Error(msgspec.Struct):
    code: str | None = None


class _Body(msgspec.Struct):
    error: _Error | None = None


_BODY = msgspec.json.Decoder(_Body)


@dataclass(slots=True)
class Tally:
    """What became of the requests of one stage."""

    outcomes: Counter[str] = field(default_factory=Counter)
    retry_after_s: set[int] = field(default_factory=set)  # values that refusals have named
    seconds: list[float] = field(default_factory=list)  # each ``ok`` took

    def lines(self) -> list[str]:
        """The outcomes, the most frequent first."""
        return [f"{count} {outcome}" for outcome, count in self.outcomes.most_common()]


def request(path: str, fields: dict[str, Any], *, key: str = "") -> bytes:
    """A POST of these fields on a connection of its own."""
    return request_of_body(path, msgspec.json.encode(fields), key=key)


def request_of_body(path: str, body: bytes, *, key: str = "") -> bytes:
    """A POST of what may not be JSON."""
    authorization = f"authorization: Bearer {key}\r\n" if key else ""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{authorization}"
        f"x-request-id: {uuid.uuid4().hex}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def ask(
    address: Address,
    data: bytes,
    tally: Tally,
    *,
    patience_s: float,
    leave_after_s: float | None = None,
) -> None:
    """Send a request and count how it ended."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    timeout_s = patience_s if leave_after_s is None else leave_after_s
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(*address, limit=_MAX_LINE)
            writer.write(data)
            outcome = await _follow(reader, tally)
    except TimeoutError:
        outcome = "late" if leave_after_s is None else "left"
    except (OSError, EOFError, ValueError):
        outcome = "refused" if writer is None else "cut"
    finally:
        if writer is not None:
            writer.transport.abort() if leave_after_s is not None else writer.close()
    tally.outcomes[outcome] += 1
    if outcome == "ok":
        tally.seconds.append(loop.time() - started)


async def ask_all(
    address: Address, requests: Iterable[bytes], tally: Tally, *, patience_s: float
) -> None:
    """All of them at once."""
    async with asyncio.TaskGroup() as tasks:
        for data in requests:
            tasks.create_task(ask(address, data, tally, patience_s=patience_s))


async def _follow(reader: asyncio.StreamReader, tally: Tally) -> str:
    status = (await reader.readline()).split(b" ", 2)[1:2]
    if not status:
        return "cut"
    is_stream, length = False, 0
    while (line := await reader.readline()).strip():
        name, _, value = line.strip().partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
        elif name.lower() == b"retry-after":
            tally.retry_after_s.add(int(value))
        elif name.lower() == b"content-type":
            is_stream = b"event-stream" in value
    if is_stream:
        return await _follow_events(reader)
    body = await reader.readexactly(length)
    if status[0].startswith(b"2"):
        return "ok"
    error = _BODY.decode(body).error if body.startswith(b"{") else None
    return f"{status[0].decode()} {error.code if error else '?'}"


async def _follow_events(reader: asyncio.StreamReader) -> str:
    while line := await reader.readline():
        if line.startswith(_DONE):
            return "ok"
        if line.startswith(_DATA) and b'"error"' in line:
            error = _BODY.decode(line[len(_DATA) :]).error
            if error is not None:
                return f"200 {error.code}"
    return "cut"
