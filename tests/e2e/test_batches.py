"""A batch on whole clusters: it makes a document and asks about it, and everything is killed."""

import json
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, Json, expected, wait_until
from tests.e2e.test_documents import DOCUMENT, MODEL, SEGMENTS, running

NUM_QUESTIONS = 60
URL = "/v1/completions"


def lines() -> list[Json]:
    source = {"source": {"token_ids": DOCUMENT}, "form": "text"}
    asked: list[tuple[str, str, Json]] = [("doc", "/v1/documents", source)]
    for number in range(NUM_QUESTIONS):
        body = {
            "document_id": "custom:doc",
            "prompt": [number + 1, 7],
            "max_tokens": 24,
            "temperature": 0,
            "return_token_ids": True,
            "ignore_eos": True,
        }
        asked.append((f"q{number}", URL, body))
    return [{"custom_id": c, "method": "POST", "url": url, "body": b} for c, url, b in asked]


def batch_of(cluster: Cluster, batch_id: str) -> Json:
    found: Json = cluster.client.get(f"/v1/batches/{batch_id}").json()
    assert found["status"] not in ("failed", "expired", "cancelled"), found
    return found


@pytest.mark.slow
def test_a_batch_outlives_every_process(tmp_path: Path) -> None:
    data = ("--data-dir", str(tmp_path / "data"), *SEGMENTS)
    text = "\n".join(json.dumps(line) for line in lines())
    with running("--prefill", "cp2", "--decode", "tp2", *data) as first:
        made = first.client.post(
            "/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", text)}
        ).json()
        batch = first.client.post(
            "/v1/batches",
            json={"input_file_id": made["id"], "endpoint": URL, "completion_window": "24h"},
        ).json()
        wait_until(
            lambda: batch_of(first, batch["id"])["request_counts"]["completed"] > 10,
            "some questions are answered",
            90.0,
        )
        first.kill()
    with running("--prefill", "cp1", "--decode", "tp1", *data) as second:
        before = batch_of(second, batch["id"])["request_counts"]
        assert before["completed"] > 10

        def done() -> Json:
            return batch_of(second, batch["id"])

        wait_until(lambda: done()["status"] == "completed", "it is done", 90.0)
        total = NUM_QUESTIONS + 1
        assert done()["request_counts"] == {"total": total, "completed": total, "failed": 0}
        content = second.client.get(f"/v1/files/{done()['output_file_id']}/content").text
    answers = {a["custom_id"]: a["response"]["body"] for a in map(json.loads, content.splitlines())}
    assert list(answers) == [line["custom_id"] for line in lines()]
    for number in range(0, NUM_QUESTIONS, 7):
        (choice,) = answers[f"q{number}"]["choices"]
        assert choice["token_ids"] == expected(MODEL, (*DOCUMENT, number + 1, 7), 24)
    cached = [
        a["usage"]["prompt_tokens_details"]["cached_tokens"]
        for a in answers.values()
        if "usage" in a and "choices" in a
    ]
    assert min(cached) > 0.9 * len(DOCUMENT)
