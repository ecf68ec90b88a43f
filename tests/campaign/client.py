"""One streamed completion on a socket: who injects faults must know what a socket saw.

A stream ends in one of these ways, and nothing else is allowed: ``done`` (its end marker came),
``left`` (we went away), ``error CODE`` (an event or a status said so), ``cut`` (the connection
ended without a word, as it does when the coordinator is killed), ``refused`` (nobody listened),
``late`` (our patience ended).
"""

import asyncio
import random
import uuid
from dataclasses import dataclass, field

from baton_client import BatonAPIError, calls
from baton_client.reading import read_answer
from baton_client.sse import DONE
from tests.campaign.oracle import Prompt
from tests.raw_http import Address, Reply, encode


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
            reader, writer = await asyncio.open_connection(*address)
            writer.write(_request(stream, salt))
            stream.end = await _follow(reader, stream, leave.after_tokens if leave else None)
    except TimeoutError:
        stream.end = "late" if leave_at is None else "left"
    except OSError:
        stream.end = "refused" if writer is None else "cut"
    finally:
        stream.ended = loop.time()
        if writer is not None and leave is not None and leave.is_reset:
            writer.transport.abort()
        elif writer is not None:
            writer.close()
    return stream


def _request(stream: Stream, salt: str | None) -> bytes:
    parameters = {
        "max_tokens": stream.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "cache_salt": salt,
    }
    prompt, request_id = stream.prompt.token_ids, stream.request_id
    return encode(calls.complete(prompt, parameters, stream=True, request_id=request_id))


async def _follow(reader: asyncio.StreamReader, stream: Stream, stop_after: int | None) -> str:
    """How it ended."""
    reply = Reply()
    async for event in reply.events(reader):
        if event.data == DONE:
            return "done"
        try:
            stream.tokens += read_answer(event.data).token_ids
        except BatonAPIError as error:
            return f"error {error.code}"
        if stop_after is not None and len(stream.tokens) >= stop_after:
            return "left"
    return "cut" if reply.error is None else f"error {reply.error.code}"


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
