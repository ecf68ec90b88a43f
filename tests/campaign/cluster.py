"""A cluster as a user starts it, and its processes as the kernel sees them."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from baton_client import AsyncClient, ClientError, ClusterState, Retry
from bench.load.local_cluster import LocalCluster
from protocol.errors import ConfigError
from tests.forks import ForkedCluster
from tests.raw_http import Address

ANSWER_S = 10.0


class ClusterLost(Exception):
    """``baton serve`` has ended, or does not answer."""


class RunningCluster:
    """A ``baton serve`` that has said that it is ready, and a client of it."""

    def __init__(self, local: LocalCluster, client: AsyncClient) -> None:
        self.client = client
        self.process = local.process
        self.processes = local.processes
        host, _, port = local.url.removeprefix("http://").partition(":")
        self.address: Address = (host, int(port))

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    async def state(self) -> ClusterState | None:
        """How it is, or None while nobody answers."""
        try:
            return await self.client.cluster()
        except ClientError:
            return None


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
        async with AsyncClient(local.url, timeout_s=ANSWER_S, retry=Retry(1)) as client:
            yield RunningCluster(local, client)
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
