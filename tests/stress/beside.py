"""What is looked at while a stage runs: whether the server still answers, and what it takes.

    python -m tests.stress.beside HOST PORT        (started by ``watching``, never by hand)

``/health`` is asked from a process of its own, on a new connection each time, as a load balancer
does; nothing that the stage's clients do delays a question. The coordinator's memory is read from
the kernel, its loop's lag from ``/metrics``.
"""

import asyncio
import contextlib
import http.client
import select
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from tests.raw_http import Address

INTERVAL_S = 0.02
TIMEOUT_S = 30.0
RSS_INTERVAL_S = 0.2
LAG_INTERVAL_S = 15.0  # the server tells the largest of 30 s
LAG_METRIC = "baton_coordinator_loop_lag_seconds "
STEP_METRIC = "baton_coordinator_loop_step_seconds "


@dataclass(slots=True)
class Beside:
    """What was seen beside one stage."""

    health_s: list[float] = field(default_factory=list)  # a question without an answer: TIMEOUT_S
    rss_before: int = 0
    rss_peak: int = 0
    lag_s: float = 0.0  # the largest
    step_s: float = 0.0  # the largest less what was waited for a core

    def note_loop(self, lag_s: float, step_s: float) -> None:
        """The server's largest figures of late."""
        self.lag_s, self.step_s = max(self.lag_s, lag_s), max(self.step_s, step_s)

    @property
    def p50_s(self) -> float:
        return self._percentile(0.5)

    @property
    def p99_s(self) -> float:
        return self._percentile(0.99)

    @property
    def max_s(self) -> float:
        return max(self.health_s, default=0.0)

    def _percentile(self, share: float) -> float:
        ordered = sorted(self.health_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def rss_bytes(pid: int) -> int:
    """Resident memory of a process; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


@contextlib.asynccontextmanager
async def watching(address: Address, pid: int) -> AsyncIterator[Beside]:
    """Look at a coordinator for as long as the block runs; the figures are complete after it."""
    seen = Beside(rss_before=rss_bytes(pid))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "tests.stress.beside", address[0], str(address[1])),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 26,
    )
    following = [
        asyncio.create_task(_follow_memory(pid, seen)),
        asyncio.create_task(_follow_lag(address, seen)),
    ]
    assert process.stdin is not None and process.stdout is not None, "both are pipes"
    await process.stdout.readline()  # it has begun
    try:
        yield seen
    finally:
        process.stdin.close()
        seen.health_s = msgspec.json.decode(await process.stdout.read(), type=list[float])
        await process.wait()
        for task in following:
            task.cancel()
        seen.note_loop(*await asyncio.to_thread(_loop_figures, address))


async def _follow_lag(address: Address, seen: Beside) -> None:
    while True:
        await asyncio.sleep(LAG_INTERVAL_S)
        seen.note_loop(*await asyncio.to_thread(_loop_figures, address))


async def _follow_memory(pid: int, seen: Beside) -> None:
    while True:
        seen.rss_peak = max(seen.rss_peak, rss_bytes(pid))
        await asyncio.sleep(RSS_INTERVAL_S)


def _get(address: Address, path: str) -> bytes:
    connection = http.client.HTTPConnection(*address, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path, headers={"connection": "close"})
        return connection.getresponse().read()
    finally:
        connection.close()


def _loop_figures(address: Address) -> tuple[float, float]:
    """The largest lag of the server's event loop in the last half minute, and the longest step."""
    try:
        lines = _get(address, "/metrics").decode().splitlines()
    except (OSError, http.client.HTTPException):
        return 0.0, 0.0
    lags = [float(line.split()[1]) for line in lines if line.startswith(LAG_METRIC)]
    steps = [float(line.split()[1]) for line in lines if line.startswith(STEP_METRIC)]
    return max(lags, default=0.0), max(steps, default=0.0)


def main() -> None:
    """Ask until standard input is closed, then say how long each answer took."""
    address = (sys.argv[1], int(sys.argv[2]))
    took: list[float] = []
    print(flush=True)
    while not select.select([sys.stdin], [], [], INTERVAL_S)[0]:
        started = time.monotonic()
        try:
            is_well = b"ok" in _get(address, "/health")
        except (OSError, http.client.HTTPException):
            is_well = False
        took.append(time.monotonic() - started if is_well else TIMEOUT_S)
    sys.stdout.buffer.write(msgspec.json.encode(took))


if __name__ == "__main__":
    main()
