"""The toy itself: its arithmetic of stalls and slots, and timers that never ring early."""

import asyncio
import time
from functools import partial

import pytest
from uvloop import run

from bench.load.driving.pacer import Pacer
from tests.bench.toy_server import ToyConfig, ToyServer, advance


@pytest.mark.parametrize(
    ("start", "duration", "end"),
    [
        (0.0, 1.0, 1.0),
        (0.0, 2.0, 2.0),
        (0.0, 2.5, 12.5),
        (1.5, 1.0, 12.5),
        (5.0, 1.0, 13.0),
        (12.0, 1.0, 13.0),
    ],
)
def test_a_stall_of_ten_seconds_at_two(start: float, duration: float, end: float) -> None:
    assert advance(start, duration, [(2.0, 10.0)]) == end


def test_slots_are_taken_in_turn() -> None:
    async def main() -> list[float]:
        server = ToyServer(ToyConfig(1.0, 0.0, 0.5, num_slots=2))
        due = [server.admit("r", 1, 3).due for _ in range(5)]
        server.close()
        return [times[0] - due[0][0] for times in due]

    # 1 s of prefill and two gaps of 0.5 s: a slot is free again 2 s after it was taken
    assert run(main()) == pytest.approx([0.0, 0.0, 2.0, 2.0, 4.0], abs=0.05)


def test_fates_are_the_seeds() -> None:
    async def main() -> list[str]:
        server = ToyServer(ToyConfig(failure_rate=0.2, error_rate=0.2, disconnect_rate=0.2))
        fates = [server.admit("r", 1, 3).fate for _ in range(2000)]
        server.close()
        return fates

    fates = run(main())
    assert fates == run(main())
    for fate in ("failure", "error", "disconnect"):
        assert fates.count(fate) / 2000 == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("runner", [run, asyncio.run], ids=["uvloop", "asyncio"])
def test_timers_ring_in_order_and_never_early(runner: object) -> None:
    rung: list[tuple[float, float]] = []

    async def main() -> None:
        pacer = Pacer()
        now = time.monotonic()
        wanted = [now + 0.001 * (n * 7 % 20) for n in range(20)] + [now - 1.0]
        for when in wanted:
            pacer.at(when, partial(lambda when: rung.append((when, time.monotonic())), when))
        await pacer.until(now + 0.05)
        await pacer.until(now)  # has passed
        pacer.close()

    assert callable(runner)
    runner(main())
    assert len(rung) == 21
    assert [when for when, _ in rung] == sorted(when for when, _ in rung)
    assert all(at >= when for when, at in rung)


def test_flushing_wakes_everybody() -> None:
    async def main() -> float:
        pacer = Pacer()
        waiting = asyncio.ensure_future(pacer.until(time.monotonic() + 60))
        await asyncio.sleep(0)
        pacer.flush()
        began = time.monotonic()
        await waiting
        pacer.close()
        return time.monotonic() - began

    assert run(main()) < 5
