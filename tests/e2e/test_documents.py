"""Documents on whole clusters: real processes, real NIXL, a real disk, and everything is killed.

The arithmetic model's next token is a function of every row of KV: what comes up from disk has to
be what was computed, to the last bit and in its place, or the answer is another one.
"""

import os
import signal
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from baton_client import Client, Document, Retry
from baton_client.types import Residency, TokenCounts
from tests.e2e.cluster import Cluster, expected, parse_path, run_cluster, wait_until

MODEL = "arithmetic:layers=3,heads=4,kv_heads=2,vocab=512,max_len=16384"
SMALL = ("--kv-memory", "32MiB", "--store-memory", "8MiB", "--checksum", "always")
SEGMENTS = ("--set", "coordinator.jobs={segment_tokens=1024}")
READY_S = 90.0
DOCUMENT = tuple(Random(5).randrange(512) for _ in range(5000))
QUESTION = (7, 3, 200, 11)
NUM_KEPT = len(DOCUMENT) // 32 * 32


def running(*flags: str) -> AbstractContextManager[Cluster]:
    return run_cluster(MODEL, *SMALL, *flags)


def has_nixl_files(cluster: Cluster) -> bool:
    """Whether its store has NIXL's file backend loaded."""
    return "libplugin_POSIX" in Path(f"/proc/{cluster.pids()['store0/0']}/maps").read_text()


def ingest(cluster: Cluster, **options: Any) -> str:
    """The id of a new document."""
    return cluster.client.documents.create(token_ids=DOCUMENT, form="text", **options).id


def status(cluster: Cluster, document_id: str) -> str:
    return cluster.client.documents.get(document_id).status


def ready(cluster: Cluster, document_id: str) -> Document:
    """The document, once it is; also over a coordinator that is away for a while."""
    retry = Retry(max_attempts=100, max_delay_s=1.0)
    with Client(cluster.url, retry=retry) as patient:
        found = patient.documents.wait(document_id, READY_S)
    assert found.status == "ready"
    return found


def ask(cluster: Cluster, document_id: str) -> tuple[list[int], int, dict[str, str]]:
    """(tokens, cached tokens, path) of an answer about the document."""
    answer = cluster.complete(QUESTION, 6, document_id=document_id)
    assert answer.usage is not None
    return answer.token_ids, answer.usage.cached_tokens, parse_path(answer.path)


@pytest.fixture(scope="module")
def answer() -> list[int]:
    return expected(MODEL, (*DOCUMENT, *QUESTION), 6)


def test_a_document_outlives_every_process(tmp_path: Path, answer: list[int]) -> None:
    """Ingested on cp2 and tp2, everything killed, asked about on cp1 and tp1.

    Packs are written and read through NIXL; the last cluster reads them without it.
    """
    data = ("--data-dir", str(tmp_path / "data"), *SEGMENTS)
    through_nixl = ("--disk-io", "nixl-posix")
    with running("--prefill", "cp2", "--decode", "tp2", *data, *through_nixl) as first:
        assert has_nixl_files(first)
        document_id = ingest(first, pin="hard", ttl="1h", tier="disk")
        found = ready(first, document_id)
        assert found.tokens == TokenCounts(total=len(DOCUMENT), done=len(DOCUMENT), cached=0)
        assert Residency(tier="disk", worker="store0", fraction=1.0) in found.residency
        tokens, cached, path = ask(first, document_id)
        assert (tokens, cached) == (answer, NUM_KEPT)
        assert path["loaded"] == str(NUM_KEPT) and "prefill" not in path
        assert ask(first, document_id)[:2] == (answer, NUM_KEPT)
        first.assert_no_leaks()
        first.kill()
    with running("--prefill", "cp1", "--decode", "tp1", *data, *through_nixl) as second:
        assert has_nixl_files(second)
        assert status(second, document_id) == "ready"
        tokens, cached, path = ask(second, document_id)
        assert (tokens, cached) == (answer, NUM_KEPT)
        assert path["loaded"] == str(NUM_KEPT) and "prefill" not in path
        second.kill()
    pack = max((tmp_path / "data" / "kv").glob("*.pack"), key=lambda path: path.stat().st_size)
    content = bytearray(pack.read_bytes())
    content[-1000] ^= 1
    pack.write_bytes(content)
    with running("--prefill", "cp1", "--decode", "tp1", *data) as third:
        assert not has_nixl_files(third)
        tokens, cached, _ = ask(third, document_id)
        assert tokens == answer, "KV that was damaged on disk was used"
        assert cached < NUM_KEPT
        assert status(third, document_id) == "damaged"
        third.assert_no_leaks()
    opened = [path for path in (tmp_path / "data").rglob("*") if path.stat().st_mode & 0o077]
    assert not opened, "somebody else may read it"


@pytest.mark.parametrize(
    "victim",
    [
        "store0/0",
        pytest.param("prefill0/0", marks=pytest.mark.slow),
        pytest.param("coordinator", marks=pytest.mark.slow),
    ],
)
def test_a_job_goes_on_after_a_death(tmp_path: Path, answer: list[int], victim: str) -> None:
    data = ("--data-dir", str(tmp_path / "data"), *SEGMENTS)
    with running("--prefill", "cp1", "--decode", "tp1", *data) as cluster:
        document_id = ingest(cluster)
        documents = cluster.client.documents
        wait_until(lambda: documents.get(document_id).tokens.done >= 1024, "a segment is done")
        os.kill(cluster.pids()[victim], signal.SIGKILL)
        ready(cluster, document_id)
        tokens, cached, _ = ask(cluster, document_id)
        assert (tokens, cached) == (answer, NUM_KEPT)


@pytest.mark.slow
def test_a_colocated_cluster_keeps_documents_too(tmp_path: Path, answer: list[int]) -> None:
    data = ("--data-dir", str(tmp_path / "data"), *SEGMENTS)
    with running("--decode", "tp2", *data) as first:
        document_id = ingest(first)
        ready(first, document_id)
        first.kill()
    with running("--decode", "tp1", *data) as second:
        assert ask(second, document_id)[:2] == (answer, NUM_KEPT)
