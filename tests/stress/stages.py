"""The stages: each asks for more than there is room or time for, in one way of doing so."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from baton_client import ClusterState, calls
from baton_client.calls import Call, Prompt
from tests.raw_http import Address, encode
from tests.stress.client import Tally, ask, ask_all

PATIENCE_S = 240.0
PLAIN_IDS = 250  # below the special ones of the arithmetic model
OK = frozenset({"ok"})
# Told in time, and when to come back.
FULL = frozenset({"503 overloaded", "503 too_many_connections", "429 too_many_requests"})


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage.

    Args:
        run: does it.
        allowed: outcomes that break no promise.
        shown: what it is at full scale, for the report.
    """

    run: Callable[["Context"], Awaitable[None]]
    allowed: frozenset[str]
    shown: str


@dataclass(slots=True)
class Context:
    """What a stage has: a server, a source of chance, a scale, and somewhere to count."""

    address: Address
    rng: random.Random
    scale: float
    tally: Tally = field(default_factory=Tally)
    notes: list[str] = field(default_factory=list)

    def num(self, at_full_scale: int) -> int:
        return max(1, int(at_full_scale * self.scale))

    def prompt(self, num_tokens: int = 64) -> list[int]:
        return [self.rng.randrange(PLAIN_IDS) for _ in range(num_tokens)]

    def completion(self, max_tokens: int = 8, **fields: Any) -> bytes:
        return complete(
            self.prompt(), max_tokens=max_tokens, temperature=0, ignore_eos=True, **fields
        )


def complete(prompt: Prompt, *, stream: bool = False, **parameters: Any) -> bytes:
    """A completion's request."""
    return encode(calls.complete(prompt, parameters, stream=stream))


async def burst(context: Context) -> None:
    """All at once, half of them streamed, within the limit of sequences."""
    requests = [context.completion(stream=number % 2 == 0) for number in range(context.num(4000))]
    await ask_all(context.address, requests, context.tally, patience_s=PATIENCE_S)


async def open_loop(context: Context) -> None:
    """Five times what the server does, whatever becomes of it, until it holds all it takes."""
    capacity = await _capacity(context)
    rate = 5 * capacity
    num = context.num(6000)
    context.notes.append(f"capacity {capacity:.0f}/s, asked {rate:.0f}/s for {num / rate:.0f} s")
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with asyncio.TaskGroup() as tasks:
        for number in range(num):
            await asyncio.sleep(max(0.0, started + number / rate - loop.time()))
            data = context.completion(stream=True)
            tasks.create_task(ask(context.address, data, context.tally, patience_s=PATIENCE_S))


async def _capacity(context: Context) -> float:
    """Requests per second with as many at a time as a pool computes together."""
    warm = Tally()
    num, started = context.num(300), time.monotonic()
    gate = asyncio.Semaphore(64)

    async def one(data: bytes) -> None:
        async with gate:
            await ask(context.address, data, warm, patience_s=PATIENCE_S)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(num):
            tasks.create_task(one(context.completion(stream=True)))
    return num / (time.monotonic() - started)


async def wide(context: Context) -> None:
    """Requests of 128 prompts with n 8: 1,024 sequences each, beside plain ones."""
    requests = []
    for _ in range(context.num(3)):
        prompts = [context.prompt(16) for _ in range(128)]
        requests.append(complete(prompts, n=8, max_tokens=2, ignore_eos=True))
    requests += [context.completion() for _ in range(context.num(100))]
    await ask_all(context.address, requests, context.tally, patience_s=PATIENCE_S)


async def bodies(context: Context) -> None:
    """The worst JSON that the limits let in, and some that they do not."""
    keys = ",".join(f'"k{number}":{number}' for number in range(25_000))
    worst: Sequence[str] = (
        f'{{"prompt":"x",{keys}}}',
        _prompt_of("[]", 8 << 20),
        _prompt_of("1", 20 << 20),
        _prompt_of("0.5", 15 << 20),
        f'{{"prompt":"{"x" * (60 << 20)}"}}',
        "[" * (1 << 20),
    )
    call = Call("POST", "/v1/completions")
    requests = [encode(call, body=text.encode()) for text in worst[: context.num(len(worst))]]
    for data in requests:  # one at a time, each beside plain ones
        plain = [context.completion() for _ in range(context.num(20))]
        await ask_all(context.address, [data, *plain], context.tally, patience_s=PATIENCE_S)


def _prompt_of(value: str, count: int) -> str:
    return f'{{"prompt":[{",".join([value] * count)}]}}'


async def text(context: Context) -> None:
    """Prompts as long as they may be, and one document of 8 MiB, to be tokenized."""
    words = b"the cat sat on a mat and "
    long = (words * (context.num(8 << 20) // len(words) + 1)).decode()
    requests = [encode(calls.create_document({"text": long}))]
    requests += [
        complete(long[: 2000 * (number + 1)], max_tokens=1) for number in range(context.num(20))
    ]
    requests += [context.completion() for _ in range(context.num(100))]
    await ask_all(context.address, requests, context.tally, patience_s=PATIENCE_S)


async def connections(context: Context) -> None:
    """More idle connections than may be open, and requests on top of them."""
    idle: list[asyncio.StreamWriter] = []
    num = context.num(6000)
    try:
        for start in range(0, num, 200):
            opened = await asyncio.gather(
                *(asyncio.open_connection(*context.address) for _ in range(min(200, num - start))),
                return_exceptions=True,
            )
            idle += [found[1] for found in opened if not isinstance(found, BaseException)]
        context.notes.append(f"{len(idle)} of {num} idle connections opened")
        requests = [context.completion() for _ in range(context.num(200))]
        await ask_all(context.address, requests, context.tally, patience_s=PATIENCE_S)
    finally:
        for writer in idle:
            writer.transport.abort()


async def churn(context: Context) -> None:
    """Callers who come, ask, and leave before they are answered."""
    gate = asyncio.Semaphore(200)

    async def one() -> None:
        async with gate:
            leave_after_s = context.rng.uniform(0.0, 0.3)
            data = context.completion(max_tokens=200, stream=True)
            await ask(
                context.address, data, context.tally,
                patience_s=PATIENCE_S, leave_after_s=leave_after_s,
            )  # fmt: skip

    async with asyncio.TaskGroup() as tasks:
        for _ in range(context.num(4000)):
            tasks.create_task(one())


STAGES: dict[str, Stage] = {
    "burst": Stage(burst, OK, "4,000 requests at once"),
    "open-loop": Stage(open_loop, OK | FULL, "five times the capacity, in an open loop"),
    "wide": Stage(wide, OK, "128 prompts x n 8, three times"),
    "bodies": Stage(
        bodies,
        OK | frozenset({"400 too_large", "400 too_deep", "400 context_length_exceeded"}),
        "JSON at the limits and beyond",
    ),
    "text": Stage(
        text,
        OK | frozenset({"400 context_length_exceeded", "400 document_too_large"}),
        "8 MiB of text",
    ),
    "connections": Stage(connections, OK, "6,000 idle connections"),
    "churn": Stage(churn, OK | frozenset({"left"}), "4,000 callers who leave"),
}  # fmt: skip


def active(state: ClusterState | None) -> int:
    """Requests that have not ended; -1 when the server does not say."""
    return -1 if state is None else state.num_active_requests
