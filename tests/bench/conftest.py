"""Toy servers: one in the test's own event loop, or one in a process of its own."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import pytest
from uvloop import run

from bench.load.analysis.slo import Slo
from bench.load.analysis.validity import Audit
from bench.load.driving.client import Budgets
from bench.load.driving.driver import Driver, Load, Target
from bench.load.record import RequestRecord
from bench.load.workload.prompts import Api, Dialect
from bench.load.workload.schedule import Planned, Schedule
from bench.load.workload.sessions import Segment, Turn
from bench.report.runs import Run
from bench.simulate.example import example_runs
from tests.bench.toy_server import ToyConfig, ToyServer

START = Callable[..., str]


@dataclass
class Driven:
    """What one run in the test's process has left."""

    records: list[RequestRecord]
    audit: Audit
    server: ToyServer
    started: float


@pytest.fixture(scope="session")
def simulated() -> list[Run]:
    """Runs of two clusters at two rates, with all that clusters tell."""
    return example_runs(1, (2.0, 4.0))


@pytest.fixture
def toy() -> Iterator[START]:
    """Starts a toy server in a process of its own; gives its URL."""
    processes: list[subprocess.Popen[str]] = []

    def start(config: ToyConfig, *flags: str) -> str:
        encoded = msgspec.json.encode(config).decode()
        command = [sys.executable, "-P", "-m", "tests.bench.toy_server", encoded, *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        return process.stdout.readline().split()[1]

    yield start
    for process in processes:
        process.terminate()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def drive() -> Callable[..., Driven]:
    """Runs a schedule against a toy server in the same event loop."""

    def drive(
        schedule: Schedule,
        config: ToyConfig,
        *,
        api: Api = Api.TOKENS,
        extensions: bool = True,
        budgets: Budgets | None = None,
        users: int | None = None,
        slo: Slo | None = None,
        url: str | None = None,
        meanwhile: Callable[[Driver], None] | None = None,
    ) -> Driven:
        async def main() -> Driven:
            server = ToyServer(config)
            listener = await server.listen()
            port = listener.sockets[0].getsockname()[1]
            target = Target(
                "toy", url or f"http://127.0.0.1:{port}", Dialect("toy", api, extensions)
            )
            load = Load(
                target,
                schedule,
                "test",
                budgets or Budgets(5.0, 20.0, 20.0),
                "closed" if users else "open",
                users or 1,
                slo=slo,
            )
            driver = Driver(load)
            driver.prepare()
            if meanwhile is not None:
                asyncio.get_running_loop().call_later(0.1, meanwhile, driver)
            started = time.monotonic() + 0.02
            audit = await driver.run(started)
            listener.close()
            server.close()
            return Driven(sorted(driver.records, key=lambda r: r.index), audit, server, started)

        return run(main())

    return drive


@pytest.fixture
def evenly() -> Callable[..., Schedule]:
    """Single requests of equal gaps, lengths given one by one."""

    def schedule(num: int, gap_s: float, *, prompt: int = 10, output: int = 5) -> Schedule:
        return Schedule(
            1,
            0,
            tuple(
                Planned(
                    n,
                    f"s{n}",
                    n * gap_s,
                    0,
                    Turn("request", (Segment(f"p{n}", prompt),), output),
                )
                for n in range(num)
            ),
        )

    return schedule
