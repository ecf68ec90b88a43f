"""A pass of the loop is short whatever is ready, lanes take turns, and nothing is left out."""

import asyncio
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from coordinator.auth import Tenants
from coordinator.config import Limits
from coordinator.http.connections.origins import Origins
from coordinator.http.entry import Door, Entry
from coordinator.loop.slices import PART_HASHES, PART_TOKENS, SLICE_S, Slices, parts_of
from coordinator.loop.turns import TURN_S, Lane, Turns
from protocol.messages import CacheUpdate, NewToken, Tokens

PIECE_S = 0.001


class FakeClock:
    """Work is what moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Passes:
    """Counts the passes of the loop, and what was done in each."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.began = [clock.now]
        self._loop = asyncio.get_running_loop()
        self.is_over = False
        self._loop.call_soon(self._next)

    def _next(self) -> None:
        self.began.append(self._clock.now)
        if not self.is_over:
            self._loop.call_soon(self._next)

    @property
    def longest_s(self) -> float:
        return max(b - a for a, b in zip(self.began, self.began[1:], strict=False))


async def run_all(num: int, do: Callable[[Turns, int], object]) -> tuple[Passes, Turns]:
    clock = FakeClock()
    turns = Turns(TURN_S, clock)
    passes = Passes(clock)
    await asyncio.gather(*(do(turns, number) for number in range(num)))  # type: ignore[arg-type]
    await turns.take(Lane.NEW)  # behind all that were called
    passes.is_over = True
    await asyncio.sleep(0)
    return passes, turns


def test_a_thousand_that_are_ready_together_take_many_short_passes() -> None:
    order: list[int] = []

    async def main() -> Passes:
        async def piece(turns: Turns, number: int) -> None:
            await turns.take(Lane.NEW)
            turns._clock.now += PIECE_S  # type: ignore[attr-defined]
            order.append(number)

        passes, _ = await run_all(1000, piece)
        return passes

    passes = asyncio.run(main())
    assert order == list(range(1000)), "first come, first served"
    assert passes.longest_s <= TURN_S + 2 * PIECE_S


def test_callbacks_share_a_pass_as_far_as_its_time_goes() -> None:
    done: list[int] = []

    async def main() -> Passes:
        async def piece(turns: Turns, number: int) -> None:
            def work() -> None:
                turns._clock.now += PIECE_S  # type: ignore[attr-defined]
                done.append(number)

            turns.call(Lane.NEW, work)

        passes, _ = await run_all(1000, piece)
        return passes

    passes = asyncio.run(main())
    assert done == list(range(1000))
    assert passes.longest_s <= TURN_S + 2 * PIECE_S
    assert len(passes.began) < 600, "several fit into a pass"


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_who_asks_how_we_are_waits_for_nobody(path: str) -> None:
    order: list[str] = []

    async def main() -> None:
        clock = FakeClock()

        async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
            clock.now += PIECE_S
            order.append(scope["path"])

        entry = Entry(
            app,
            limits=Limits(),
            origins=Origins((), ()),
            tenants=Tenants((), ""),
            door=Door(),
            turns=Turns(TURN_S, clock),
        )
        asked = ["/v1/completions"] * 1000 + [path]
        scopes: list[Scope] = [
            {"type": "http", "method": "GET", "path": one, "headers": []} for one in asked
        ]
        await asyncio.gather(*(entry(scope, receive, send) for scope in scopes))

    async def receive() -> Message:
        raise AssertionError("nobody reads")

    async def send(message: Message) -> None:
        raise AssertionError(message)

    asyncio.run(main())
    assert order.index(path) < 10 < len(order) == 1001


def test_new_requests_do_not_keep_answers_waiting() -> None:
    order: list[Lane] = []

    async def main() -> None:
        async def piece(turns: Turns, number: int) -> None:
            lane = Lane.NEW if number < 900 else Lane.ANSWERS
            await turns.take(lane)
            turns._clock.now += PIECE_S  # type: ignore[attr-defined]
            order.append(lane)

        await run_all(1000, piece)

    asyncio.run(main())
    last_answer = max(index for index, lane in enumerate(order) if lane is Lane.ANSWERS)
    assert last_answer < 2 * 100 + 10, "they were asked for after 900 new ones"


def test_who_is_cancelled_takes_no_turn() -> None:
    async def main() -> None:
        turns = Turns(0.0)
        await turns.take(Lane.NEW)
        waiting = [asyncio.create_task(turns.take(Lane.NEW)) for _ in range(10)]
        await asyncio.sleep(0)
        for task in waiting[:9]:
            task.cancel()
        async with asyncio.timeout(5):
            await waiting[9]
        assert turns.num_waiting == 0

    asyncio.run(main())


def test_work_that_walks_over_everything_lets_others_run() -> None:
    done: list[int] = []

    def work() -> Iterator[None]:
        for number in range(100):
            until = time.monotonic() + SLICE_S / 4
            while time.monotonic() < until:
                pass
            done.append(number)
            yield

    async def main() -> int:
        slices, num_turns = Slices(), 0
        running = asyncio.create_task(slices.run())
        slices.add(work())
        slices.add(iter(()))
        assert 0 < len(done) < 100, "a slice at once"
        while len(done) < 100:
            num_turns += 1
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await slices.settled()
        running.cancel()
        return num_turns

    assert asyncio.run(main()) > 10
    assert done == list(range(100))


@given(
    num_stored=st.sampled_from([0, 1, PART_HASHES, PART_HASHES + 1, 3 * PART_HASHES]),
    num_evicted=st.sampled_from([0, 1, PART_HASHES, PART_HASHES + 1, 3 * PART_HASHES]),
)
def test_parts_of_what_a_pool_has_cached_say_the_same(num_stored: int, num_evicted: int) -> None:
    evicted = tuple(number.to_bytes(4) for number in range(num_evicted))
    stored = tuple(number.to_bytes(4) for number in range(1, num_stored + 1))
    held, expected = set(evicted[1::2]), set(evicted[1::2])
    expected.difference_update(evicted)
    expected.update(stored)
    for part in parts_of(CacheUpdate(stored, evicted, tier="disk")):
        assert isinstance(part, CacheUpdate) and part.tier == "disk"
        assert max(len(part.stored), len(part.evicted)) <= PART_HASHES
        held.difference_update(part.evicted)
        held.update(part.stored)
    assert held == expected


@pytest.mark.parametrize("num", [0, 1, PART_TOKENS, 2 * PART_TOKENS + 1])
def test_parts_of_a_step_have_all_its_tokens_in_order(num: int) -> None:
    whole = Tokens(7, tuple(NewToken("r", 1, index, index) for index in range(num)))
    parts = [msgspec.structs.astuple(part) for part in parts_of(whole)]
    assert [token for _, tokens, *_ in parts for token in tokens] == list(whole.tokens)
    assert all(step == 7 and len(tokens) <= PART_TOKENS for step, tokens, *_ in parts)
