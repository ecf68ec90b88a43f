"""Several tenants: none takes the others' turns, room or connections."""

import threading
from pathlib import Path

import httpx

from tests.coordinator.jobs.world import Site, parse_events, start_site

KEYS = ("first-key", "second-key")
TEXT = "What is kept for a tenant. " * 20


def of_second(site: Site) -> httpx.Client:
    """The other tenant's client; the site's own is the first's."""
    headers = {"authorization": f"Bearer {KEYS[1]}"}
    return httpx.Client(base_url=site.client.base_url, timeout=60.0, headers=headers)


def upload(client: httpx.Client, name: str) -> str:
    files = {"file": (name, f"{name} says: {TEXT}".encode())}
    reply = client.post("/v1/documents", files=files)
    assert reply.status_code == 202, reply.text
    document_id: str = reply.json()["id"]
    return document_id


def test_files_that_take_long_to_read_keep_no_other_tenant_waiting(tmp_path: Path) -> None:
    slow = "jobs.parse:delay=600@1,jobs.parse:delay=600@2"
    with start_site(tmp_path, api_keys=KEYS, failpoints=slow) as site:
        theirs = [upload(site.client, f"slow-{number}.txt") for number in range(5)]
        for document_id in theirs[:2]:
            site.until(lambda name=document_id: site.get(name)["status"] == "tokenizing")
        with of_second(site) as client:
            document_id = upload(client, "quick.txt")
            found = client.get(f"/v1/documents/{document_id}", params={"wait": 20}).json()
        assert found["status"] == "ready"
        assert {site.get(name)["status"] for name in theirs[2:]} == {"queued"}


def test_a_priority_does_not_pass_another_tenant(tmp_path: Path) -> None:
    with start_site(tmp_path, api_keys=KEYS) as site, of_second(site) as client:
        site.close_gate()
        begun = site.ingest(text=f"Begun. {TEXT}")["id"]
        site.until(lambda: site.get(begun)["status"] == "prefilling")
        loud = [
            site.post(source={"text": f"{number}. {TEXT * 4}"}, priority=100).json()["id"]
            for number in range(6)
        ]
        quiet = client.post("/v1/documents", json={"source": {"text": TEXT}}).json()["id"]
        site.open_gate()
        found = client.get(f"/v1/documents/{quiet}", params={"wait": 20}).json()
        assert found["status"] == "ready"
        for name in loud:
            site.wait(name)
        last = max(site.events(name)[-1]["created_at"] for name in loud)
        told = parse_events(client.get(f"/v1/documents/{quiet}/events").text)
        assert told[-1]["created_at"] < last


def test_a_quota_of_bytes(tmp_path: Path) -> None:
    with start_site(tmp_path, api_keys=KEYS, jobs={"tenant_quota_bytes": 50_000}) as site:
        files = {"file": ("in.txt", b"a" * 30_000)}
        sent = site.client.post("/v1/files", files=files, data={"purpose": "user_data"})
        assert sent.status_code == 200
        again = site.client.post("/v1/files", files=files, data={"purpose": "user_data"})
        assert (again.status_code, again.json()["error"]["code"]) == (403, "quota_exceeded")
        large = site.post(source={"text": "b" * 25_000})
        assert (large.status_code, large.json()["error"]["code"]) == (403, "quota_exceeded")
        assert "30000 of files" in large.json()["error"]["message"]
        with of_second(site) as client:
            assert client.post("/v1/files", files=files, data={"purpose": "user_data"}).is_success
        # Its text has room, its KV has not.
        error = site.wait(site.ingest(text=TEXT)["id"], "failed")["error"]
        assert (error["code"], error["status"]) == ("quota_exceeded", 403)


def test_documents_that_wait_are_bounded(tmp_path: Path) -> None:
    jobs = {"max_tenant_waiting": 2, "max_waiting": 3}
    with start_site(tmp_path, api_keys=KEYS, jobs=jobs) as site, of_second(site) as client:
        site.close_gate()
        first = site.ingest(text=f"1. {TEXT}")["id"]
        site.ingest(text=f"2. {TEXT}")
        own = site.post(source={"text": f"3. {TEXT}"})
        assert (own.status_code, own.json()["error"]["code"]) == (429, "too_many_waiting")
        assert int(own.headers["retry-after"]) >= 1
        body = {"source": {"text": TEXT}}
        assert client.post("/v1/documents", json=body).status_code == 202
        full = client.post("/v1/documents", json=body)
        assert (full.status_code, full.json()["error"]["code"]) == (503, "too_many_waiting")
        site.open_gate()
        site.wait(first)
        site.until(lambda: site.post(source={"text": f"3. {TEXT}"}).status_code == 202)


def test_watchers_are_bounded(tmp_path: Path) -> None:
    jobs = {"max_tenant_watchers": 1}
    with start_site(tmp_path, api_keys=KEYS, jobs=jobs) as site:
        site.close_gate()
        document_id = site.ingest(text=TEXT)["id"]
        watchers = site.running.jobs.documents.engine.watchers
        waiting = threading.Thread(target=lambda: site.get(document_id, wait=20))
        waiting.start()
        site.until(lambda: watchers.num_watching == 1)
        for path, query in (("", {"wait": 5}), ("/events", {})):
            refused = site.client.get(f"/v1/documents/{document_id}{path}", params=query)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "too_many_watchers"
            assert refused.headers["retry-after"] == "5"
        site.get(document_id)  # who only looks is served
        site.open_gate()
        waiting.join(20)
        site.until(lambda: watchers.num_watching == 0)
        assert site.events(document_id)[-1]["status"] == "ready"
        site.until(lambda: watchers.num_watching == 0)
