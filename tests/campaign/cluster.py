"""A cluster as a user starts it, and its processes as the kernel sees them."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bench.load.local_cluster import LocalCluster
from protocol.errors import ConfigError
from tests.campaign.client import Address, get_json
from tests.forks import ForkedCluster


class ClusterLost(Exception):
    """``baton serve`` has ended, or does not answer."""


class RunningCluster:
    """A ``baton serve`` that has said that it is ready."""

    def __init__(self, local: LocalCluster) -> None:
        self.process = local.process
        self.processes = local.processes
        host, _, port = local.url.removeprefix("http://").partition(":")
        self.address: Address = (host, int(port))

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    async def state(self) -> dict[str, Any] | None:
        """``/v1/cluster``, or None while nobody answers."""
        return await get_json(self.address, "/v1/cluster")


@asynccontextmanager
async def run_cluster(
    *flags: str, log: Path | None = None, is_forked: bool = True
) -> AsyncIterator[RunningCluster]:
    """``baton serve`` with UCX over TCP, for as long as the block runs.

    Shared memory, UCX's choice on one host, would hide every asynchronous path. Forks start sooner;
    where memory is measured, it should be of interpreters, which share no pages.

    Raises:
        ClusterLost: it did not become ready.
    """
    kind = ForkedCluster if is_forked else LocalCluster
    local = kind(flags, log=log, environment={"UCX_TLS": "tcp"})
    try:
        try:
            await asyncio.to_thread(local.wait_until_ready)
        except ConfigError as error:
            raise ClusterLost(str(error)) from error
        yield RunningCluster(local)
    finally:
        await asyncio.to_thread(local.stop)


def process_state(pid: int) -> str:
    """The kernel's letter for it: R, S, T when it is stopped, Z or "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][1:2]
    except OSError:
        return ""


def send_signal(pid: int, number: signal.Signals) -> bool:
    """Whether there was somebody to send it to."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
