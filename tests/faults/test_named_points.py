"""A rank that dies or hangs at a named point: the fault takes effect, and can be seen to."""

import asyncio
import random
from pathlib import Path

import pytest

from tests.campaign.cluster import process_state
from tests.campaign.stages import SMALL, Context, failpoints
from tests.campaign.tally import Tally
from tests.campaign.workload import Mix, Workload

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
DEADLINE_S = 60.0


@pytest.mark.parametrize(
    ("role", "point"),
    [
        ("prefill", "handoff.send.announce"),
        ("prefill", "handoff.send.commit"),
        ("decode", "control.send.committed"),
        ("decode", "transfer.read"),
    ],
)
def test_a_rank_dies_where_it_is_told_to(tmp_path: Path, role: str, point: str) -> None:
    log, tally = tmp_path / "log", Tally()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        context = Context(random.Random(1), tally, loop.time() + DEADLINE_S, log=log)
        flags = (*SMALL, *failpoints(role, f"{point}:exit@3"))
        async with context.cluster(*flags) as (cluster, _):
            pids = {name: pid for name, pid in cluster.processes().items() if role in name}
            load = Workload(cluster, context.oracle, context.rng, tally, Mix(concurrency=4))
            load.excuses = lambda _: True
            await load.run(lambda: not _died(log, point) and not context.is_late)
            gone = [name for name, pid in pids.items() if process_state(pid) in ("", "Z")]
            assert gone, f"nobody has died: {pids}"

    asyncio.run(run())
    assert _died(log, point)
    assert not tally.lies


def _died(log: Path, point: str) -> bool:
    return f"failpoint {point}: exit" in log.read_text()


def test_a_step_that_hangs_is_seen_from_outside(tmp_path: Path) -> None:
    tally = Tally()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        context = Context(random.Random(1), tally, loop.time() + DEADLINE_S, log=tmp_path / "log")
        flags = (*SMALL, *failpoints("decode", "step:hang@5"))
        async with context.cluster(*flags) as (cluster, watch):
            load = Workload(cluster, context.oracle, context.rng, tally, Mix(concurrency=2))
            requests = asyncio.create_task(load.run(lambda: True))  # they will hang as well
            async with asyncio.timeout(DEADLINE_S):
                while not watch.total("failpoint:step:hang"):
                    await watch.look()
            requests.cancel()
            await asyncio.wait([requests])

    asyncio.run(run())
    assert not tally.lies
