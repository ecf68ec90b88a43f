"""A start at which little can be written: completions serve, the rest waits for room.

A limit on the size of files stands in for the full disk: to SQLite a write fails all the same.
"""

import resource
import threading
import time
from pathlib import Path
from typing import Any

DEADLINE_S = 30.0
ONE_POOL = (("decode0", "decode", 1, 1),)
TEXT = {"source": {"text": "what there is no room for"}}


def write_little() -> None:
    """Less than a page of a database."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, most))


def lift(pid: int) -> None:
    _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))


def test_completions_serve_and_documents_wait_for_room(
    tmp_path: Path, start_coordinator: Any
) -> None:
    with start_coordinator(
        tmp_path,
        ONE_POOL,
        prepare=write_little,
        data_dir=str(tmp_path / "data"),
        secret="s" * 64,
        batches={"min_free_bytes": 1},
    ) as running:
        client = running.client
        pid = running.coordinator.process.pid
        assert running.complete([1, 2, 3], max_tokens=2).status_code == 200
        assert client.get("/ready").status_code == 200
        upload = {"files": {"file": ("a", b"some text")}, "data": {"purpose": "user_data"}}
        asked = [client.post("/v1/documents", json=TEXT), client.post("/v1/files", **upload)]
        asked += [client.get(f"/v1/{kind}") for kind in ("documents", "files", "batches")]
        asked += [client.delete(f"/v1/{kind}/none") for kind in ("documents", "files")]
        for reply in asked:
            assert reply.status_code == 507, (reply.request.url, reply.text)
            assert reply.json()["error"]["code"] == "insufficient_storage"
        storage = running.state()["storage"]
        assert (storage["state"], storage["has_ballast"]) == ("full", False)

        lift(pid)
        deadline, pause = time.monotonic() + DEADLINE_S, threading.Event()
        while client.post("/v1/documents", json=TEXT).status_code != 202:
            assert time.monotonic() < deadline, client.post("/v1/documents", json=TEXT).text
            pause.wait(0.05)
        while running.state()["storage"] | {"free_bytes": 0} != {
            "state": "ok",
            "reason": None,
            "free_bytes": 0,
            "has_ballast": True,
        }:
            assert time.monotonic() < deadline, running.state()["storage"]
            pause.wait(0.05)
        assert (tmp_path / "data" / "secret").read_text() == "s" * 64
        assert client.post("/v1/files", **upload).status_code == 200
