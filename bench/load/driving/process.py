"""Drivers in processes of their own: one core each, nothing else in their event loops.

    python -m bench.load.driving.process RECORDS_FILE      (started by ``drive``, never by hand)

1. The parent writes a ``Load`` as one line of JSON to each child and waits until all are prepared.
2. It names one instant of CLOCK_MONOTONIC, which all processes of a host share, as the start.
3. Children tell how far they are, twice a second; ``stop``, or the parent's death, ends them early.
4. Each child leaves its records in a file and its audit of itself on standard output.
"""

import asyncio
import contextlib
import gc
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
from uvloop import run

from bench.load.analysis.validity import Audit
from bench.load.driving.driver import Driver, Load, Progress
from bench.load.record import RequestRecord, read_records, write_records
from bench.load.workload.schedule import Schedule

PROGRESS_S = 0.5
_LEAD_S = 0.3  # from the order to start until the start
_MAX_LINE = 1 << 30  # of a load: the whole schedule
# What one core does without being late, with room; see ``python -m tests.bench.capacity``.
CORE_REQUESTS_PER_S = 300.0
CORE_EVENTS_PER_S = 20_000.0

OnProgress = Callable[[Progress], bool]
"""Gets the sum over all processes; true stops the run."""
Beside = Callable[[float], Coroutine[Any, Any, None]]
"""Gets the run's start; runs in the parent from before it until the run's end."""


class DriverError(RuntimeError):
    """A driver's process has died: a bug, or the machine ran out of something."""


class _Said(msgspec.Struct, omit_defaults=True):
    """One line of a child."""

    is_ready: bool = False
    progress: Progress | None = None
    audit: Audit | None = None


_SAID = msgspec.json.Decoder(_Said)


def num_processes_for(schedule: Schedule, num_cores: int) -> int:
    """How many processes a schedule takes, of all cores but one."""
    over_s = max(schedule.duration_s, 1.0)
    num_needed = max(
        len(schedule.requests) / over_s / CORE_REQUESTS_PER_S,
        schedule.num_output_tokens / over_s / CORE_EVENTS_PER_S,
    )
    return max(1, min(num_cores - 1, -int(-num_needed // 1)))


async def drive(
    loads: Sequence[Load], on_progress: OnProgress | None = None, beside: Beside | None = None
) -> tuple[list[RequestRecord], list[Audit]]:
    """Run every load in a process of its own, all from one start. Records in order of indexes.

    Raises:
        DriverError: a process has died.
    """
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        paths = [Path(folder) / f"{number}.jsonl" for number in range(len(loads))]
        children = [_Child(path) for path in paths]
        try:
            await asyncio.gather(
                *(child.start(load) for child, load in zip(children, loads, strict=True))
            )
            start_at = time.monotonic() + _LEAD_S
            for child in children:
                child.tell(repr(start_at))
            helpers = [asyncio.create_task(_watch(children, on_progress))]
            if beside is not None:
                helpers.append(asyncio.create_task(beside(start_at)))
            try:
                audits = await asyncio.gather(*(child.follow() for child in children))
            finally:
                for helper in helpers:
                    helper.cancel()
            if on_progress is not None:
                on_progress(total([child.progress for child in children]))
        finally:
            for child in children:
                await child.end()
        records = [record for path in paths for record in read_records(path)]
    return sorted(records, key=lambda record: (record.target, record.index)), audits


async def _watch(children: Sequence["_Child"], on_progress: OnProgress | None) -> None:
    while on_progress is not None:
        await asyncio.sleep(PROGRESS_S)
        if on_progress(total([child.progress for child in children])):
            for child in children:
                child.tell("stop")
            return


def total(parts: Sequence[Progress]) -> Progress:
    """The sum; each part's TTFTs are taken out of it, so that none is told twice."""
    summed = Progress()
    for part in parts:
        summed.num_planned += part.num_planned
        summed.num_sent += part.num_sent
        summed.num_in_flight += part.num_in_flight
        summed.num_tokens += part.num_tokens
        summed.num_missed += part.num_missed
        for outcome, count in part.outcomes.items():
            summed.outcomes[outcome] = summed.outcomes.get(outcome, 0) + count
        summed.ttfts_s += part.ttfts_s
        part.ttfts_s = []
    return summed


class _Child:
    """One driver's process, as its parent sees it."""

    def __init__(self, records_path: Path) -> None:
        self.progress = Progress()
        self._path = records_path
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, load: Load) -> None:
        """Returns when it is prepared."""
        self.progress.num_planned = len(load.schedule.requests)
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "bench.load.driving.process", str(self._path)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 24,
        )
        self.tell(msgspec.json.encode(load).decode())
        assert self._process.stdin is not None
        await self._process.stdin.drain()
        await self._hear()

    def tell(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    async def follow(self) -> Audit:
        """Keep ``progress`` current until the end."""
        while (said := await self._hear()).audit is None:
            if said.progress is not None:
                said.progress.ttfts_s = self.progress.ttfts_s + said.progress.ttfts_s
                self.progress = said.progress
        return said.audit

    async def _hear(self) -> _Said:
        assert self._process is not None
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise DriverError(f"a driver process ended with {await self._process.wait()}")
        return _SAID.decode(line)

    async def end(self) -> None:
        if self._process is None:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()  # whoever still runs takes this for our death
        if self._process.returncode is None:
            await self._process.wait()


# ---- in the child ------------------------------------------------------------------------------


def _say(said: _Said) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(said) + b"\n")
    sys.stdout.buffer.flush()


async def _heed(driver: Driver, reader: asyncio.StreamReader) -> None:
    await reader.readline()  # "stop", or the end of our parent
    driver.stop()


async def _report(driver: Driver) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        _say(_Said(progress=driver.tally.report()))


async def _child(records_path: Path) -> None:
    reader = asyncio.StreamReader(limit=_MAX_LINE)
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    driver = Driver(msgspec.json.decode(await reader.readline(), type=Load))
    driver.prepare()
    gc.collect()
    gc.freeze()  # the schedule is not garbage: no collection has to look at it
    _say(_Said(is_ready=True))
    line = await reader.readline()
    if not line:
        return
    helpers = [asyncio.create_task(_heed(driver, reader)), asyncio.create_task(_report(driver))]
    audit = await driver.run(float(line))
    for helper in helpers:
        helper.cancel()
    write_records(records_path, driver.records)
    _say(_Said(progress=driver.tally.report()))
    _say(_Said(audit=audit))


def main() -> None:
    """Be one driver."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    with contextlib.suppress(BrokenPipeError):  # our parent has died, and nobody wants to know
        run(_child(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
