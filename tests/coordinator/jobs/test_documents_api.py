"""``/v1/documents`` as a caller sees it."""

import re
from typing import Any

TEXT = "The quick brown fox jumps over the lazy dog. " * 20


def test_a_document_is_made_ready(site: Any) -> None:
    made = site.ingest(text=TEXT)
    assert re.fullmatch(r"doc_[0-9a-f]{32}", made["id"])
    assert (made["object"], made["status"], made["attempt"]) == ("document", "queued", 0)
    found = site.wait(made["id"])
    num_tokens = len(f"user: {TEXT}")
    assert found["tokens"] == {"total": num_tokens, "done": num_tokens, "cached": 0}
    assert found["chunks"] == {"total": 4, "done": 4}
    assert found["usage"]["cache_creation_tokens"] >= num_tokens
    assert found["residency"] == [{"tier": "gpu", "worker": "simulated", "fraction": 1.0}]
    assert (found["attempt"], found["error"], found["ring_size"]) == (1, None, 1)
