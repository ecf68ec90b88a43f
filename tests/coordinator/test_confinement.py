"""What the processes that read strangers' texts have got, seen by the kernel, while they run."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from coordinator.config import JobLimits
from coordinator.jobs.parsing.formats import PLAIN
from coordinator.jobs.parsing.process import extract
from coordinator.text.process import WorkerProcess
from tests.coordinator.test_text_workers import DEADLINE_S, settings, until, worker_pids

MEMORY_BYTES = 1 << 30


def run(work: Callable[[], Awaitable[None]]) -> None:
    """On the event loop that the coordinator has, beside what a child must not get."""

    async def whole() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await work()

    with socket.socket() as door, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        door.bind(("127.0.0.1", 0))
        os.set_inheritable(door.fileno(), True)
        runner.run(whole())


def is_confined(pid: int) -> bool:
    return "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text()


def files_of(pid: int) -> dict[int, str]:
    """What it has open, beside its three streams."""
    links = {int(link.name): os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    return {number: target for number, target in links.items() if number > 2}


def limits_of(pid: int) -> dict[str, str]:
    """Hard limits by name."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return {line[:26].strip(): line[26:].split()[1] for line in lines[1:]}


def test_a_text_worker(tmp_path: Path) -> None:
    async def work() -> None:
        others_pids = worker_pids()  # of tests that ran here before
        worker = await WorkerProcess.started(settings(tmp_path, text_memory_bytes=MEMORY_BYTES))
        try:
            (pid,) = worker_pids() - others_pids
            assert is_confined(pid)
            files = list(files_of(pid).values())
            assert sum(file.startswith("socket:") for file in files) == 1, files
            error = os.readlink("/proc/self/fd/2")  # of which its log has another number
            others = {file for file in files if not file.startswith("socket:")}
            assert others <= {"/memfd:baton-text (deleted)", error}, others
            limits = limits_of(pid)
            assert limits["Max address space"] == str(MEMORY_BYTES)
            assert limits["Max core file size"] == "0"
        finally:
            await worker.end()

    run(work)


def test_a_parser(tmp_path: Path) -> None:
    async def work() -> None:
        source, text = tmp_path / "source", tmp_path / "text"
        os.mkfifo(source)
        writer = os.open(source, os.O_RDWR)
        limits = JobLimits(parse_memory_bytes=MEMORY_BYTES)
        others_pids = worker_pids()
        extracting = asyncio.create_task(extract(source, text, PLAIN, limits))
        (pid,) = await until(lambda: worker_pids() - others_pids)
        await until(lambda: is_confined(pid))
        assert files_of(pid) == {}
        found = limits_of(pid)
        assert found["Max address space"] == str(MEMORY_BYTES)
        assert found["Max file size"] == str(limits.max_text_bytes)
        assert found["Max cpu time"] == str(limits.parse_cpu_s + 5)
        assert found["Max core file size"] == "0"
        os.write(writer, b"some text")
        os.close(writer)
        assert await extracting == []
        assert text.read_text() == "some text"

    run(work)
