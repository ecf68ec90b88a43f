"""Whole clusters, started as a user starts them: ``baton serve ...`` as a process."""

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.load.local_cluster import LocalCluster, descendants


class RunningCluster:
    """A ``baton serve`` process that has printed its ready line."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url
        self.client = httpx.Client(base_url=url, timeout=120.0)

    def complete(self, prompt: Any, max_tokens: int, **fields: Any) -> dict[str, Any]:
        """A greedy completion; returns the answer with its path header under ``path``."""
        body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "return_token_ids": True,
            "ignore_eos": True,
            **fields,
        }
        reply = self.client.post("/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        return {**reply.json(), "path": parse_path(reply.headers["x-baton-path"])}

    def tokens(self, prompt: Any, max_tokens: int, **fields: Any) -> list[int]:
        """The greedy tokens after ``prompt``."""
        token_ids: list[int] = self.complete(prompt, max_tokens, **fields)["choices"][0][
            "token_ids"
        ]
        return token_ids

    def cluster(self) -> dict[str, Any]:
        """What ``/v1/cluster`` says."""
        state: dict[str, Any] = self.client.get("/v1/cluster").json()
        return state


def parse_path(header: str) -> dict[str, str]:
    """``decode=d0; local; cached=3`` as a dict; a bare word maps to the empty string."""
    parts = (part.strip().partition("=") for part in header.split(";"))
    return {name: value for name, _, value in parts}


def wait_until(condition: Any, what: str, timeout_s: float = 20.0) -> None:
    """Wait for another process to get somewhere; there is no event to wait for but its answers."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s} s: {what}"
        pause.wait(0.02)


@contextlib.contextmanager
def run_cluster(
    *flags: str, environment: dict[str, str] | None = None, log: Path | None = None
) -> Iterator[RunningCluster]:
    """``baton serve --port 0 FLAGS`` until the block ends; then it must end cleanly."""
    local = LocalCluster(flags, log=log, environment=environment)
    try:
        cluster = RunningCluster(local.process, local.wait_until_ready())
        with cluster.client:
            yield cluster
    finally:
        ranks = descendants(local.process.pid)
        code = local.stop()
    assert code == 0
    assert not [pid for pid in ranks if os.path.exists(f"/proc/{pid}")], "a rank was left behind"


@pytest.fixture(scope="session")
def start_cluster() -> Any:
    """The function that starts a cluster, for tests of any folder below."""
    return run_cluster


def assert_no_leaks(cluster: RunningCluster) -> None:
    """Every block of every pool is free or cached once nothing runs."""

    def is_clean() -> bool:
        pools = cluster.cluster()["pools"]
        return all(pool["blocks"] for pool in pools) and all(
            space["free"] + space["cached"] == space["total"]
            for pool in pools
            for space in pool["blocks"]
        )

    wait_until(is_clean, f"blocks are still held: {json.dumps(cluster.cluster())}")


@pytest.fixture(scope="session")
def no_leaks() -> Any:
    """The function that asserts that a cluster holds nothing."""
    return assert_no_leaks


@pytest.fixture(scope="session")
def until() -> Any:
    """The function that waits for another process with a deadline."""
    return wait_until
