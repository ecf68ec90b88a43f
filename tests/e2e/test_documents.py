"""Documents on whole clusters: real processes, real NIXL, a real disk, and everything is killed.

The arithmetic model's next token is a function of every row of KV: what comes up from disk has to
be what was computed, to the last bit and in its place, or the answer is another one.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from bench.load.local_cluster import local_cluster
from modeling.arithmetic import expected_tokens
from modeling.checkpoint.config import load_config

MODEL = "arithmetic:layers=3,heads=4,kv_heads=2,vocab=512,max_len=16384"
SMALL = ("--kv-memory", "32MiB", "--store-memory", "8MiB", "--checksum", "always")
SEGMENTS = ("--set", "coordinator.jobs={segment_tokens=1024}")
READY_S = 90.0
DOCUMENT = tuple(Random(5).randrange(512) for _ in range(5000))
QUESTION = (7, 3, 200, 11)
NUM_KEPT = len(DOCUMENT) // 32 * 32


class Cluster:
    """A cluster that may be killed, with all of its processes, at any moment."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.client = httpx.Client(base_url=url, timeout=60.0)

    def pids(self) -> dict[str, int]:
        """Of its processes, by what they run: "prefill", "store"..."""
        found = {}
        for pid in _children(self.process.pid):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if "-m" in words:
                found[words[words.index("-m") + 1]] = pid
        return found

    @property
    def has_nixl_files(self) -> bool:
        """Whether its store has NIXL's file backend loaded."""
        store = self.pids()["store"]
        return "libplugin_POSIX" in Path(f"/proc/{store}/maps").read_text()

    def kill(self) -> None:
        """All of it, at once."""
        children = _children(self.process.pid)
        self.process.kill()
        self.process.wait()
        _until(lambda: not [pid for pid in children if _runs(pid)], "the children are gone")

    def ingest(self, **fields: Any) -> str:
        body = {"source": {"token_ids": DOCUMENT}, "form": "text", **fields}
        reply = self.client.post("/v1/documents", json=body)
        assert reply.status_code == 202, reply.text
        document_id: str = reply.json()["id"]
        return document_id

    def document(self, document_id: str, wait_s: float = 0.0) -> dict[str, Any]:
        reply = self.client.get(f"/v1/documents/{document_id}", params={"wait": wait_s})
        assert reply.status_code == 200, reply.text
        found: dict[str, Any] = reply.json()
        return found

    def ready(self, document_id: str) -> dict[str, Any]:
        """The document, once it is."""
        end = time.monotonic() + READY_S
        while (found := self.document(document_id, 5.0))["status"] != "ready":
            assert found["status"] not in ("failed", "cancelled", "expired"), found
            assert time.monotonic() < end, found
        return found

    def ask(self, document_id: str) -> tuple[list[int], int, str]:
        """(tokens, cached tokens, path) of an answer about the document."""
        body = {
            "document_id": document_id,
            "prompt": QUESTION,
            "max_tokens": 6,
            "temperature": 0,
            "return_token_ids": True,
            "ignore_eos": True,
        }
        reply = self.client.post("/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        answer = reply.json()
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return answer["choices"][0]["token_ids"], cached, reply.headers["x-baton-path"]


@contextmanager
def running(*flags: str) -> Iterator[Cluster]:
    with local_cluster((MODEL, *SMALL, *flags)) as local:
        cluster = Cluster(local.process, local.url)
        with cluster.client:
            yield cluster


@pytest.fixture(scope="module")
def answer() -> list[int]:
    return expected_tokens(load_config(MODEL), (*DOCUMENT, *QUESTION), 6)


def test_a_document_outlives_every_process(
    tmp_path: Path, answer: list[int], no_leaks: Any
) -> None:
    """Ingested on cp2 and tp2, everything killed, asked about on cp1 and tp1.

    Packs are written and read through NIXL; the last cluster reads them without it.
    """
    data = ("--data-dir", str(tmp_path / "data"), *SEGMENTS)
    through_nixl = ("--disk-io", "nixl-posix")
    with running("--prefill", "cp2", "--decode", "tp2", *data, *through_nixl) as first:
        assert first.has_nixl_files
        document_id = first.ingest(pin={"mode": "hard", "ttl": "1h", "tier": "disk"})
        found = first.ready(document_id)
        assert found["tokens"] == {"total": len(DOCUMENT), "done": len(DOCUMENT), "cached": 0}
        assert {"tier": "disk", "worker": "store0", "fraction": 1.0} in found["residency"]
        tokens, cached, path = first.ask(document_id)
        assert (tokens, cached) == (answer, NUM_KEPT)
        assert f"loaded={NUM_KEPT}" in path and "prefill=" not in path
        assert first.ask(document_id)[:2] == (answer, NUM_KEPT)
        no_leaks(_Leaks(first))
        first.kill()
    with running("--prefill", "cp1", "--decode", "tp1", *data, *through_nixl) as second:
        assert second.has_nixl_files
        assert second.document(document_id)["status"] == "ready"
        tokens, cached, path = second.ask(document_id)
        assert (tokens, cached) == (answer, NUM_KEPT)
        assert f"loaded={NUM_KEPT}" in path and "prefill=" not in path
        second.kill()
    pack = max((tmp_path / "data" / "kv").glob("*.pack"), key=lambda path: path.stat().st_size)
    content = bytearray(pack.read_bytes())
    content[-1000] ^= 1
    pack.write_bytes(content)
    with running("--prefill", "cp1", "--decode", "tp1", *data) as third:
        assert not third.has_nixl_files
        tokens, cached, _ = third.ask(document_id)
        assert tokens == answer, "KV that was damaged on disk was used"
        assert cached < NUM_KEPT
        assert third.document(document_id)["status"] == "damaged"
        no_leaks(_Leaks(third))
    found = [path for path in (tmp_path / "data").rglob("*") if path.stat().st_mode & 0o077]
    assert not found, "somebody else may read it"


@pytest.mark.parametrize(
    "victim",
    [
        "store",
        pytest.param("prefill", marks=pytest.mark.slow),
        pytest.param("coordinator", marks=pytest.mark.slow),
    ],
)
def test_a_job_goes_on_after_a_death(tmp_path: Path, answer: list[int], victim: str) -> None:
    data = ("--data-dir", str(tmp_path / "data"), *SEGMENTS)
    with running("--prefill", "cp1", "--decode", "tp1", *data) as cluster:
        document_id = cluster.ingest()
        _until(lambda: cluster.document(document_id)["tokens"]["done"] >= 1024, "a segment is done")
        os.kill(cluster.pids()[victim], signal.SIGKILL)
        _until(lambda: _is_ready(cluster, document_id), "it is ready", READY_S)
        tokens, cached, _ = cluster.ask(document_id)
        assert (tokens, cached) == (answer, NUM_KEPT)


@pytest.mark.slow
def test_a_colocated_cluster_keeps_documents_too(tmp_path: Path, answer: list[int]) -> None:
    data = ("--data-dir", str(tmp_path / "data"), *SEGMENTS)
    with running("--decode", "tp2", *data) as first:
        document_id = first.ingest()
        first.ready(document_id)
        first.kill()
    with running("--decode", "tp1", *data) as second:
        assert second.ask(document_id)[:2] == (answer, NUM_KEPT)


class _Leaks:
    """What ``no_leaks`` looks at."""

    def __init__(self, cluster: Cluster) -> None:
        self._client = cluster.client

    def cluster(self) -> Any:
        return self._client.get("/v1/cluster").json()


def _is_ready(cluster: Cluster, document_id: str) -> bool:
    """The coordinator itself may be gone for a moment."""
    try:
        return cluster.document(document_id)["status"] == "ready"
    except (httpx.HTTPError, AssertionError):
        return False


def _children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid: int) -> bool:
    """A killed process that nobody waits for is a zombie for a moment."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _until(condition: Any, what: str, timeout_s: float = 30.0) -> None:
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        pause.wait(0.05)
