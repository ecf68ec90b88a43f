"""Thousands of requests at once over plain sockets, each followed to its end.

An outcome is ``ok``, the error's ``STATUS code`` (of a status or of an event in a stream), ``cut``
(the connection ended without an end), ``refused`` (no connection), ``left`` (we went away as we had
meant to) or ``late`` (our patience ended).
"""

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from baton_client import BatonAPIError
from baton_client.reading import read_answer
from baton_client.sse import DONE
from tests.raw_http import Address, Reply


@dataclass(slots=True)
class Tally:
    """What became of the requests of one stage."""

    outcomes: Counter[str] = field(default_factory=Counter)
    retry_after_s: set[int] = field(default_factory=set)  # values that refusals have named
    seconds: list[float] = field(default_factory=list)  # each ``ok`` took

    def lines(self) -> list[str]:
        """The outcomes, the most frequent first."""
        return [f"{count} {outcome}" for outcome, count in self.outcomes.most_common()]


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
            reader, writer = await asyncio.open_connection(*address)
            writer.write(data)
            outcome = await _follow(reader, tally)
    except TimeoutError:
        outcome = "late" if leave_after_s is None else "left"
    except OSError:
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
    reply = Reply()
    async for event in reply.events(reader):
        if event.data == DONE:
            return "ok"
        try:
            read_answer(event.data)
        except BatonAPIError as error:
            return f"200 {error.code}"
    refusal = reply.error
    if refusal is None:
        return "ok" if reply.is_whole and not reply.is_stream else "cut"
    if refusal.retry_after is not None:
        tally.retry_after_s.add(int(refusal.retry_after))
    return f"{refusal.status} {refusal.code or '?'}"
