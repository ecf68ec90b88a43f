"""What the runner does with what goes wrong, and what is left after a restart."""

import os
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.jobs.documents.document_files import packed_tokens, read_text, read_tokens
from coordinator.jobs.documents.segments import segment_ends
from coordinator.jobs.engine.marks import Marks, boot_id
from coordinator.jobs.engine.suspects import Work
from coordinator.jobs.files.folder import DurableFolder
from modeling.checkpoint.config import load_config
from protocol.errors import RequestError
from tests.coordinator.jobs.world import BLOCK_SIZE, FINGERPRINT, FakeIngestor, Site, start_site

TEXT = "Prefill runs the first leg. " * 40  # five segments of 256 tokens


def failure(code: str, status: int = 503) -> RequestError:
    return RequestError(f"it was {code}", code=code, status=status)


@pytest.fixture
def failing(site: Site) -> Iterator[Any]:
    """A site whose next segments a test lets fail."""
    yield site
    site.ingestor.failures.clear()
    site.ingestor.is_ready = True


@pytest.mark.parametrize("code", ["worker_lost", "handoff_failed", "no_workers", "stalled"])
def test_what_may_pass_is_tried_again(failing: Site, code: str) -> None:
    failing.ingestor.failures = [failure(code), failure(code)]
    document_id = failing.ingest(text=f"{code}. {TEXT}")["id"]
    found = failing.wait(document_id)
    assert found["attempt"] == 3
    warnings = [e for e in failing.events(document_id) if e["type"] == "warning"]
    assert [(e["code"], e["retry_in_s"]) for e in warnings] == [(code, 0.01), (code, 0.02)]


def test_progress_begins_the_pauses_anew(failing: Site) -> None:
    document_id = failing.ingest(text=f"Anew. {TEXT}")["id"]
    failing.wait(document_id)
    requests = [r for r in failing.ingestor.requests if r.document_id == document_id]
    assert [len(r.token_ids) for r in requests[:-1]] == [256, 512, 768, 1024]
    assert len(requests[-1].token_ids) == len(f"user: Anew. {TEXT}")


@pytest.mark.parametrize(
    ("code", "status"), [("request_quarantined", 500), ("kv_capacity_exceeded", 400)]
)
def test_what_will_not_pass_fails(failing: Site, code: str, status: int) -> None:
    failing.ingestor.failures = [failure(code, status)]
    document_id = failing.ingest(text=f"{code}. {TEXT}")["id"]
    found = failing.wait(document_id, "failed")
    assert (found["error"]["code"], found["error"]["status"]) == (code, status)
    assert failing.events(document_id)[-1]["error"]["code"] == code
    assert document_id not in failing.ingestor.pins
    assert failing.post(f"/{document_id}/resume").status_code == 202
    again = failing.wait(document_id)
    assert (again["attempt"], again["error"]) == (2, None)


def test_it_goes_on_from_the_last_segment(failing: Site) -> None:
    failing.close_gate()
    document_id = failing.ingest(text=f"Goes on. {TEXT}")["id"]
    failing.until(lambda: failing.get(document_id)["status"] == "prefilling")

    failing.open_gate()
    failing.wait(document_id)
    failing.evict(failing.hashes_of(document_id)[33:])
    assert failing.get(document_id)["status"] == "evicted"
    failing.post(f"/{document_id}/rewarm")
    found = failing.wait(document_id)
    assert found["resumed_from_token"] == 33 * 16
    ends = [len(r.token_ids) for r in failing.ingestor.requests if r.document_id == document_id]
    assert ends[5:] == [768, 1024, ends[4]]


def test_nothing_is_begun_before_the_cluster_is_ready(failing: Site) -> None:
    failing.ingestor.is_ready = False
    document_id = failing.ingest(text=f"Patience. {TEXT}")["id"]
    assert failing.get(document_id, wait=0.5)["status"] == "queued"
    failing.ingestor.is_ready = True
    assert failing.wait(document_id)["attempt"] == 1


def test_a_bug_fails_one_document(failing: Site, caplog: pytest.LogCaptureFixture) -> None:
    failing.ingestor.failures = [KeyError("a bug")]
    document_id = failing.ingest(text=f"Bug. {TEXT}")["id"]
    found = failing.wait(document_id, "failed")
    assert found["error"]["code"] == "internal_error"
    assert "a bug" not in found["error"]["message"]
    assert any("failed by a bug" in record.message for record in caplog.records)
    failing.wait(failing.ingest(text=f"After it. {TEXT}")["id"])


def test_deadline(failing: Site) -> None:
    failing.close_gate()
    reply = failing.post(source={"text": f"Late. {TEXT}"}, deadline="0.2s")
    document_id = reply.json()["id"]
    found = failing.wait(document_id, "expired")
    assert failing.events(document_id)[-1]["status"] == "expired"
    assert found["deadline"] < found["created_at"] + 2
    assert failing.post(f"/{document_id}/resume").status_code == 409
    assert failing.post(f"/{document_id}/cancel").status_code == 409
    failing.open_gate()


def test_a_store_that_is_too_small(tmp_path: Path) -> None:

    class Leaking(FakeIngestor):  # type: ignore[name-defined,misc]
        def _store(self, block_hashes: Any) -> None:
            super()._store(block_hashes)
            self.stored.pop(next(iter(self.stored)))

    ingestor = Leaking(BLOCK_SIZE, FINGERPRINT)
    with start_site(tmp_path, ingestor=ingestor) as site:
        found = site.wait(site.ingest(text=TEXT)["id"], "failed")
        assert found["error"]["code"] == "kv_capacity_exceeded"


def test_what_is_larger_than_the_pools_is_refused_with_both_numbers(tmp_path: Path) -> None:
    ingestor = FakeIngestor(BLOCK_SIZE, FINGERPRINT, max_tokens=500)
    with start_site(tmp_path, ingestor=ingestor) as site:
        error = site.post(source={"token_ids": [1] * 501}).json()["error"]
        assert error["code"] == "document_too_large"
        assert "501" in error["message"] and "500" in error["message"]
        found = site.wait(site.ingest(text="a" * 600)["id"], "failed")
        assert "606" in found["error"]["message"] and "500" in found["error"]["message"]


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()

    def ingestor() -> Any:
        return FakeIngestor(BLOCK_SIZE, FINGERPRINT, folder=data, chunk_tokens=64)

    options = {"data_dir": str(data), "secret": "the same"}
    with start_site(tmp_path, ingestor=ingestor(), **options) as site:
        ready = site.post(
            source={"text": TEXT}, pin={"mode": "hard", "ttl": "1h"}, idempotency_key="k"
        ).json()["id"]
        before = site.wait(ready)
        events = site.events(ready)
        site.close_gate()
        running = site.ingest(text=f"Running. {TEXT}")["id"]
        waiting = site.ingest(text=f"Waiting. {TEXT}")["id"]
        site.until(lambda: site.get(running)["status"] == "prefilling")
    stranger = data / "documents" / f"doc_{'0' * 32}.text"
    stranger.write_text("left by a process that was killed")
    again = ingestor()
    with start_site(tmp_path, ingestor=again, **options) as site:
        assert {**site.get(ready), "rate_tok_s": 0} == {**before, "rate_tok_s": 0}
        assert site.events(ready) == events
        assert again.pins[ready][1] == "hard"
        found = site.wait(running)
        assert found["attempt"] == 2
        assert site.wait(waiting)["tokens"]["done"] == found["tokens"]["total"]
        states = [e["status"] for e in site.events(running) if e["type"] == "state"]
        assert states.count("queued") == 2
        assert site.post(source={"text": TEXT}, idempotency_key="k").status_code == 409
        body = {"source": {"text": TEXT}, "pin": {"mode": "hard", "ttl": "1h"}}
        assert site.post(**body, idempotency_key="k").json()["id"] == ready
        answer = site.ask(ready, "Still there?")
        assert answer["usage"]["prompt_tokens"] > 1000
        assert not stranger.exists()


def test_another_model(tmp_path: Path) -> None:
    options = {"data_dir": str(tmp_path / "data"), "secret": "the same"}
    with start_site(tmp_path, **options) as site:
        text = site.ingest(text=TEXT)["id"]
        ids = site.ingest(token_ids=[5] * 200)["id"]
        site.wait(text)
        site.wait(ids)
    other = {**options, "model": "arithmetic:vocab=400"}
    ingestor = FakeIngestor(BLOCK_SIZE, load_config(other["model"]).fingerprint)
    with start_site(tmp_path, ingestor=ingestor, **other) as site:
        found = site.get(text)
        assert found["status"] == "mismatched"
        assert found["mismatch"]["reason"] == "model_changed"
        answer = site.ask(text, "What?", return_token_ids=True)
        assert answer["cache_miss"]["reason"] == "model_changed"
        assert bytes(answer["choices"][0]["prompt_token_ids"]).startswith(b"user: Prefill")
        site.post(f"/{text}/rewarm")
        again = site.wait(text)
        assert again["model_fingerprint"] != found["model_fingerprint"]
        assert "cache_miss" not in site.ask(text, "What?")
        body = {"prompt": [1], "document_id": ids, "max_tokens": 1}
        error = site.client.post("/v1/completions", json=body).json()["error"]
        assert error["code"] == "document_model_changed"


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    with start_site(tmp_path, data_dir=str(tmp_path / "data")) as site:
        site.close_gate()
        document_id = site.ingest(text=f"Fills up. {TEXT}")["id"]
        site.until(lambda: site.get(document_id)["status"] == "prefilling")
        site.pragma("max_page_count = 1")  # taken as: no more than there are
        site.open_gate()
        reply = site.until(
            lambda: (r := site.post(source={"text": "x" * 3000})).status_code != 202 and r
        )
        assert (reply.status_code, reply.json()["error"]["code"]) == (507, "insufficient_storage")
        assert site.client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
        site.pragma("max_page_count = 1000000")
        site.wait(document_id)
        for document in site.client.get("/v1/documents").json()["data"]:
            site.wait(document["id"])


def test_who_waits_is_told_of_the_end(tmp_path: Path) -> None:
    with start_site(tmp_path) as site:
        site.close_gate()
        document_id = site.ingest(text=TEXT)["id"]
        site.until(lambda: site.get(document_id)["status"] == "prefilling")
        path = f"/v1/documents/{document_id}"
        with ThreadPoolExecutor(2) as pool:
            waiting = pool.submit(site.client.get, path, params={"wait": 20})
            streaming = pool.submit(site.client.get, f"{path}/events")
            changes = site.running.jobs.documents.table.changes
            site.until(lambda: changes.num_waiting)
            site.running.loop.call_soon_threadsafe(site.running.coordinator.stop)
            assert waiting.result(20).json()["error"]["code"] == "shutting_down"
            text = streaming.result(20).text
        assert "shutting_down" in text and "[DONE]" not in text


def test_damaged_tokens_are_made_again(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with start_site(tmp_path, data_dir=str(data), secret="the same") as site:
        text = site.ingest(text=TEXT)["id"]
        ids = site.ingest(token_ids=[5] * 200)["id"]
        site.wait(text)
        site.wait(ids)
    for document_id in (text, ids):
        path = data / "documents" / f"{document_id}.tokens"
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content)
    with start_site(tmp_path, data_dir=str(data), secret="the same") as site:
        assert site.ask(text, "What?")["usage"]["prompt_tokens"] > len(TEXT)
        body = {"prompt": [1], "document_id": ids}
        reply = site.client.post("/v1/completions", json=body)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (500, "document_damaged")


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    folder = DurableFolder(tmp_path / "documents", "")
    assert os.stat(folder.path).st_mode & 0o077 == 0
    folder.write("doc_a.tokens", packed_tokens([0, 1, 2**32 - 1]))
    folder.write("doc_b.text", "né".encode())
    assert read_tokens(folder.path, "doc_a") == (0, 1, 2**32 - 1)
    assert read_text(folder.path, "doc_b") == "né"
    folder.new("doc_a.text").write_text("half")
    following = DurableFolder(folder.path, "")
    following.write("doc_c.text", b"written before its row is")
    following.sweep({"doc_a"})
    assert {path.name for path in folder.path.iterdir()} == {"doc_a.tokens", "doc_c.text"}
    folder.remove("doc_a.tokens")
    folder.remove("doc_a.tokens")
    with pytest.raises(RequestError, match="ingest it again"):
        read_tokens(folder.path, "doc_a")


@given(st.integers(0, 100), st.integers(0, 3000), st.integers(1, 512))
def test_segments_cover_everything_once(num_blocks: int, total: int, segment: int) -> None:
    stored = min(total, num_blocks * 16)
    ends = list(segment_ends(stored, total, segment))
    assert ends == sorted(set(ends))
    assert (ends[-1] if ends else stored) == max(total, stored)
    assert all(end % segment == 0 for end in ends[:-1])
    assert all(end > stored for end in ends)


def test_what_the_server_dies_of_is_set_aside_until_it_is_asked_for(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with start_site(tmp_path, data_dir=str(data)) as site:
        poison = site.ingest(text=f"Ends us. {TEXT}")["id"]
        ready = site.ingest(text=f"Ends us later. {TEXT}")["id"]
        site.wait(poison)
        site.wait(ready)
    for _ in range(2):
        dead = Marks(data / "marks", boot_id())
        dead.put(Work("document", poison, 3))
    connection = sqlite3.connect(data / "jobs.sqlite")
    with connection:  # a row that no version has written keeps nobody from starting
        connection.execute("UPDATE job SET body = ? WHERE job_id = ?", (b"{", ready))
    connection.close()
    with start_site(tmp_path, data_dir=str(data)) as site:
        site.until(lambda: site.get(poison)["status"] == "failed")
        error = site.get(poison)["error"]
        assert (error["code"], error["status"]) == ("set_aside", 500)
        assert "2 times" in error["message"]
        assert site.events(poison)[-1]["error"]["code"] == "set_aside"
        assert "baton_jobs_set_aside 1.0" in site.client.get("/metrics").text
        broken = site.client.get(f"/v1/documents/{ready}")
        assert (broken.status_code, broken.json()["error"]["code"]) == (500, "document_damaged")
        site.wait(site.ingest(text=f"After it. {TEXT}")["id"])
        assert site.post(f"/{poison}/retry").status_code == 202
        assert site.wait(poison)["error"] is None
        assert "baton_jobs_set_aside 0.0" in site.client.get("/metrics").text
