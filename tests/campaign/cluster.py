"""A cluster as a user starts it, and its processes as the kernel sees them.

The ranks are found by the configuration that they were started with, each time anew: a gang that
has been restarted has other processes under the same names.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.campaign.client import Address, get_json

START_S = 120.0
STOP_S = 25.0


class ClusterLost(Exception):
    """``baton serve`` has ended, or does not answer."""


class RunningCluster:
    """A ``baton serve`` that has said that it is ready."""

    def __init__(self, process: subprocess.Popen[str], address: Address) -> None:
        self.process = process
        self.address = address

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    async def state(self) -> dict[str, Any] | None:
        """``/v1/cluster``, or None while nobody answers."""
        return await get_json(self.address, "/v1/cluster")

    def processes(self) -> dict[str, int]:
        """Process ids by name: ``coordinator``, ``prefill0/0``, ``decode0/1``..."""
        found = {}
        for pid in _descendants(self.process.pid):
            arguments = _command_line(pid)
            if "--config" in arguments[:-1]:
                file = Path(arguments[arguments.index("--config") + 1])
                found[file.stem.replace(".", "/")] = pid
        return found


@asynccontextmanager
async def run_cluster(*flags: str, log: Path | None = None) -> AsyncIterator[RunningCluster]:
    """``baton serve`` with UCX over TCP, for as long as the block runs.

    Shared memory, UCX's choice on one host, would hide every asynchronous path.

    Raises:
        ClusterLost: it did not become ready.
    """
    serve = [sys.executable, "-P", "-m", "launcher", "serve", "--port", "0", *flags]
    process = _start(["/usr/bin/env", "UCX_TLS=tcp", *serve], log)
    try:
        yield RunningCluster(process, await _ready(process))
    finally:
        await _stop(process)


def _start(command: list[str], log: Path | None) -> subprocess.Popen[str]:
    if log is None:
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with log.open("a") as errors:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)


async def _ready(process: subprocess.Popen[str]) -> Address:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_S):
            line = await asyncio.to_thread(process.stdout.readline)
    except TimeoutError:
        line = "nothing in time"
    if not line.startswith("ready http://"):
        raise ClusterLost(f"the cluster did not start: {line!r}")
    host, _, port = line.split()[1].removeprefix("http://").partition(":")
    return host, int(port)


async def _stop(process: subprocess.Popen[str]) -> None:
    for pid in _descendants(process.pid):  # who was stopped cannot end
        send_signal(pid, signal.SIGCONT)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        await asyncio.to_thread(process.wait, STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in _read(Path(f"/proc/{pid}/task")):
        for child in _text(Path(f"/proc/{pid}/task/{task}/children")).split():
            found += [int(child), *_descendants(int(child))]
    return found


def _command_line(pid: int) -> Sequence[str]:
    return _text(Path(f"/proc/{pid}/cmdline")).split("\0")[:-1]


def process_state(pid: int) -> str:
    """The kernel's letter for it: R, S, T when it is stopped, Z or "" when it is gone."""
    return _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2][1:2]


def send_signal(pid: int, number: signal.Signals) -> bool:
    """Whether there was somebody to send it to."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _read(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
