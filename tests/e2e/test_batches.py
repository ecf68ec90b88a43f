"""A batch on whole clusters: it makes a document and asks about it, and everything is killed."""

import json
from pathlib import Path

import pytest

from baton_client.types import RequestCounts
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


def num_done(cluster: Cluster, batch_id: str) -> int:
    counts = cluster.client.batches.get(batch_id).request_counts
    return 0 if counts is None else counts.completed


@pytest.mark.slow
def test_a_batch_outlives_every_process(tmp_path: Path) -> None:
    data = ("--data-dir", str(tmp_path / "data"), *SEGMENTS)
    text = "\n".join(json.dumps(line) for line in lines())
    with running("--prefill", "cp2", "--decode", "tp2", *data) as first:
        file = first.client.files.create(text.encode(), filename="in.jsonl")
        batch = first.client.batches.create(file.id, URL)
        wait_until(lambda: num_done(first, batch.id) > 10, "some questions are answered", 90.0)
        first.kill()
    with running("--prefill", "cp1", "--decode", "tp1", *data) as second:
        assert num_done(second, batch.id) > 10
        done = second.client.batches.wait(batch.id, 90.0)
        total = NUM_QUESTIONS + 1
        assert done.request_counts == RequestCounts(total=total, completed=total, failed=0)
        assert done.output_file_id is not None
        content = second.client.files.content(done.output_file_id)
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
