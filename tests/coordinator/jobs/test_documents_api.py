"""``/v1/documents`` as a caller sees it."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.coordinator.jobs.world import Site, start_site

TEXT = "The quick brown fox jumps over the lazy dog. " * 20


def code_of(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def test_a_document_is_made_ready(site: Site) -> None:
    made = site.ingest(text=TEXT)
    assert re.fullmatch(r"doc_[0-9a-f]{32}", made["id"])
    assert (made["object"], made["status"], made["attempt"]) == ("document", "queued", 0)
    found = site.wait(made["id"])
    num_tokens = len(f"user: {TEXT}")
    assert found["tokens"] == {"total": num_tokens, "done": num_tokens, "cached": 0}
    assert found["chunks"] == {"total": 4, "done": 4}
    assert found["usage"] == {"cache_creation_tokens": num_tokens, "cache_read_tokens": 0}
    assert found["residency"] == [{"tier": "gpu", "worker": "simulated", "fraction": 1.0}]
    assert (found["attempt"], found["error"], found["ring_size"]) == (1, None, 1)
    assert found["model_fingerprint"] and found["ready_at"] >= found["created_at"]


def test_the_same_text_again_is_found(site: Site) -> None:
    text = "Said twice. " * 50
    first = site.wait(site.ingest(text=text)["id"])
    again = site.wait(site.ingest(text=text)["id"])
    assert again["id"] != first["id"]
    assert again["usage"]["cache_creation_tokens"] == 0
    assert again["tokens"]["cached"] == again["tokens"]["total"]
    assert again["resumed_from_token"] == again["tokens"]["total"]


def test_events_are_numbered_and_can_be_read_on(site: Site) -> None:
    document_id = site.ingest(text="Events. " * 200)["id"]
    events = site.events(document_id)
    assert [e["sequence_number"] for e in events] == list(range(1, len(events) + 1))
    states = [e["status"] for e in events if e["type"] == "state"]
    assert states == ["queued", "tokenizing", "prefilling", "storing", "ready"]
    progress = [e for e in events if e["type"] == "progress"]
    done = [e["tokens"]["done"] for e in progress]
    assert done == sorted(done) and done[-1] == progress[-1]["tokens"]["total"]
    assert all(e["document_id"] == document_id for e in events)
    assert site.events(document_id, after=3) == events[3:]
    assert site.events(document_id, after=10**9) == []
    headers = {"last-event-id": "4"}
    text = site.client.get(f"/v1/documents/{document_id}/events", headers=headers).text
    assert text.startswith("id: 5\nevent: ")


def test_events_come_as_they_happen(site: Site) -> None:
    site.close_gate()
    document_id = site.ingest(text="Live. " * 200)["id"]
    seen: list[str] = []
    with site.client.stream("GET", f"/v1/documents/{document_id}/events") as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        for line in reply.iter_lines():
            seen.append(line)
            if '"prefilling"' in line:
                site.open_gate()
    assert seen[-2:] == ["data: [DONE]", ""]
    assert any('"ready"' in line for line in seen)


def test_a_reader_who_leaves_ends_nothing(site: Site) -> None:
    site.close_gate()
    document_id = site.ingest(text="Leaving. " * 100)["id"]
    with site.client.stream("GET", f"/v1/documents/{document_id}/events") as reply:
        next(reply.iter_lines())
    site.open_gate()
    site.wait(document_id)


def test_pages(tmp_path: Path) -> None:
    with start_site(tmp_path) as site:
        ids = [site.ingest(text=f"Page {number}. " * 10)["id"] for number in range(5)]
        for order, expected in (("asc", ids), ("desc", ids[::-1])):
            found: list[str] = []
            query: dict[str, Any] = {"limit": 2, "order": order}
            while True:
                page = site.client.get("/v1/documents", params=query).json()
                found += [document["id"] for document in page["data"]]
                if not page["has_more"]:
                    break
                query["after"] = page["last_id"]
            assert found == expected
        empty = site.client.get("/v1/documents", params={"after": ids[0]}).json()
        assert (empty["data"], empty["has_more"], empty["last_id"]) == ([], False, None)
        assert len(site.client.get("/v1/documents", params={"limit": 10**9}).json()["data"]) == 5
        for query in ({"limit": 0}, {"limit": -1}, {"limit": "x"}, {"order": "up"}):
            assert code_of(site.client.get("/v1/documents", params=query))[0] == 400
        unknown = site.client.get("/v1/documents", params={"after": "doc_" + "0" * 32})
        assert code_of(unknown) == (404, "document_not_found")


def test_tenants_do_not_see_each_other(tmp_path: Path) -> None:
    with start_site(tmp_path, api_keys=("one", "two")) as site:
        document_id = site.ingest(text=TEXT)["id"]
        site.wait(document_id)
        path = f"/v1/documents/{document_id}"
        other = {"authorization": "Bearer two"}
        for method, where, body in (
            ("GET", path, None),
            ("DELETE", path, None),
            ("PATCH", path, {"metadata": {}}),
            ("POST", f"{path}/cancel", {}),
            ("POST", f"{path}/resume", {}),
            ("POST", f"{path}/rewarm", {}),
            ("GET", f"{path}/events", None),
            ("GET", f"/v1/documents?after={document_id}", None),
        ):
            reply = site.client.request(method, where, json=body, headers=other)
            assert code_of(reply) == (404, "document_not_found"), where
        assert site.client.get("/v1/documents", headers=other).json()["data"] == []
        reply = site.client.post(
            "/v1/completions",
            json={"prompt": "?", "document_id": document_id},
            headers=other,
        )
        assert code_of(reply) == (404, "document_not_found")
        # The same text of another tenant is computed anew.
        theirs = site.client.post(
            "/v1/documents", json={"source": {"text": TEXT}}, headers=other
        ).json()
        url = f"/v1/documents/{theirs['id']}?wait=20"
        found = site.client.get(url, headers=other).json()
        assert found["usage"]["cache_creation_tokens"] == found["tokens"]["total"]


@pytest.mark.parametrize("name", ["nothing", "doc_", "doc_" + "g" * 32, "doc_" + "0" * 32, "%00"])
def test_unknown_ids(site: Site, name: str) -> None:
    assert code_of(site.client.get(f"/v1/documents/{name}")) == (404, "document_not_found")


def test_idempotency(site: Site) -> None:
    headers = {"idempotency-key": "once"}
    body = {"source": {"text": "Only once. " * 20}, "display_name": "a"}

    def post(_: int) -> httpx.Response:
        return site.client.post("/v1/documents", json=body, headers=headers)

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(post, range(100)))
    assert {reply.json()["id"] for reply in replies} == {replies[0].json()["id"]}
    assert sorted(reply.status_code for reply in replies) == [200] * 99 + [202]
    for change in ({"display_name": "b"}, {"source": {"text": "Other."}}, {"form": "text"}):
        reply = site.client.post("/v1/documents", json={**body, **change}, headers=headers)
        assert code_of(reply) == (409, "idempotency_conflict")
    again = site.post(**body, idempotency_key="once")
    assert (again.status_code, again.json()["id"]) == (200, replies[0].json()["id"])
    both = site.client.post(
        "/v1/documents", json={**body, "idempotency_key": "two"}, headers=headers
    )
    assert code_of(both) == (400, "invalid_value")


def test_cancel_and_resume(site: Site) -> None:
    site.close_gate()
    document_id = site.ingest(text="Cancelled and resumed. " * 60)["id"]
    path = f"/{document_id}"
    site.until(lambda: site.get(document_id)["status"] == "prefilling")
    aborted = site.ingestor.num_aborted
    reply = site.post(f"{path}/cancel")
    assert (reply.status_code, reply.json()["status"]) == (202, "cancelled")
    assert site.ingestor.num_aborted == aborted + 1
    again = site.post(f"{path}/cancel")
    assert (again.status_code, again.json()["status"]) == (200, "cancelled")
    assert code_of(site.post(f"{path}/rewarm")) == (409, "not_rewarmable")
    reply = site.post(f"{path}/resume")
    assert (reply.status_code, reply.json()["status"]) == (202, "queued")
    site.open_gate()
    found = site.wait(document_id)
    assert found["attempt"] == 2
    assert code_of(site.post(f"{path}/cancel")) == (409, "not_cancellable")
    assert code_of(site.post(f"{path}/resume")) == (409, "not_resumable")


def test_a_queued_document_is_cancelled(site: Site) -> None:
    site.close_gate()
    first = site.ingest(text="In front. " * 60)["id"]
    site.until(lambda: site.get(first)["status"] == "prefilling")
    second, third = (site.ingest(text=f"Behind {n}. " * 60)["id"] for n in range(2))
    assert site.post(f"/{third}/cancel").status_code == 202
    site.open_gate()
    site.wait(first)
    site.wait(second)
    assert site.get(third)["status"] == "cancelled"
    assert not [r for r in site.ingestor.requests if r.document_id == third]


def test_delete(site: Site) -> None:
    shared = "Shared by both of them. " * 20
    first = site.ingest(text=shared + "One goes on like this. " * 20)["id"]
    second = site.ingest(text=shared + "The other one does not. " * 20)["id"]
    site.wait(first)
    site.wait(second)
    hashes = {name: set(site.hashes_of(name)) for name in (first, second)}
    reply = site.client.delete(f"/v1/documents/{first}")
    assert reply.json() == {"id": first, "object": "document", "deleted": True}
    assert code_of(site.client.get(f"/v1/documents/{first}")) == (404, "document_not_found")
    assert code_of(site.client.delete(f"/v1/documents/{first}")) == (404, "document_not_found")
    own = hashes[first] - hashes[second]
    site.until(lambda: not own & set(site.ingestor.stored), "its own blocks are forgotten")
    assert hashes[second] <= set(site.ingestor.stored)
    assert site.get(second)["status"] == "ready"


def test_delete_while_it_is_made(site: Site) -> None:
    site.close_gate()
    document_id = site.ingest(text="Deleted early. " * 100)["id"]
    site.until(lambda: site.get(document_id)["status"] == "prefilling")
    assert site.client.delete(f"/v1/documents/{document_id}").status_code == 200
    site.open_gate()
    following = site.ingest(text="Next. " * 50)["id"]
    site.wait(following)
    assert document_id not in site.ingestor.pins


@pytest.mark.parametrize(
    ("value", "status"), [("-1", 400), ("-0.5", 400), ("x", 400), ("nan", 400), ("1e9", 200)]
)
def test_wait(site: Site, value: str, status: int) -> None:
    document_id = site.ingest(text=f"Waited for {value}. " * 20)["id"]
    reply = site.client.get(f"/v1/documents/{document_id}", params={"wait": value})
    assert reply.status_code == status
    if status == 200:
        assert reply.json()["status"] == "ready"


def test_wait_ends(tmp_path: Path) -> None:
    with start_site(tmp_path, jobs={"max_wait_s": 0.05}) as site:
        site.close_gate()
        document_id = site.ingest(text=TEXT)["id"]
        assert site.get(document_id, wait=10**9)["status"] != "ready"
        site.open_gate()


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({}, 400, "invalid_value", "source"),
        ({"source": {}}, 400, "invalid_value", "source"),
        ({"source": {"text": "a", "token_ids": [1]}}, 400, "invalid_value", "source"),
        ({"source": {"text": ""}}, 422, "unprocessable_document", "source"),
        ({"source": {"text": 5}}, 400, "invalid_type", "source"),
        ({"source": "text"}, 400, "invalid_type", "source"),
        ({"source": {"token_ids": []}}, 422, "unprocessable_document", "source"),
        ({"source": {"token_ids": [-1]}}, 400, "invalid_value", "source"),
        ({"source": {"token_ids": [True]}}, 400, "invalid_type", "source"),
        ({"source": {"token_ids": [1] * 5000}}, 400, "document_too_large", "source"),
        ({"source": {"text": "a" * 40_000}}, 400, "document_too_large", "source"),
        ({"source": {"messages": []}}, 400, "invalid_value", "source"),
        ({"source": {"messages": [{"role": "system", "content": "a"}]}}, 400, None, "source"),
        ({"source": {"file_id": "file-unknown"}}, 404, "file_not_found", "source"),
        ({"model": "other"}, 404, "model_not_found", "model"),
        ({"form": "both"}, 400, "invalid_value", "form"),
        ({"priority": 101}, 400, "invalid_value", "priority"),
        ({"deadline": 5}, 400, "invalid_value", "deadline"),
        ({"deadline": "soon"}, 400, "invalid_value", "deadline"),
        ({"cp": 3}, 400, "invalid_value", "cp"),
        ({"cp": True}, 400, None, "cp"),
        ({"metadata": {"a": "b" * 5000}}, 400, "invalid_value", "metadata"),
        ({"metadata": {str(n): n for n in range(65)}}, 400, "invalid_value", "metadata"),
        ({"pin": {"mode": "iron"}}, 400, "invalid_value", "pin"),
        ({"pin": {"mode": "soft", "ttl": "2y"}}, 400, "invalid_value", "pin"),
        ({"pin": {"mode": "soft", "ttl": -1}}, 400, "invalid_value", "pin"),
        ({"pin": {"mode": "soft", "ttl": "31d"}}, 400, "invalid_value", "pin"),
        ({"pin": {"mode": "soft", "tier": "tape"}}, 400, "invalid_value", "pin"),
        ({"pin": {"mode": "soft", "tier": "disk"}}, 400, "invalid_value", "pin"),
        ({"pin": {}}, 400, None, "pin"),
        ({"idempotency_key": ""}, 400, None, "idempotency_key"),
        ({"pined": {"mode": "soft"}}, 400, "unsupported_parameter", "pined"),
        ({"pin": {"mode": "soft", "tll": "2h"}}, 400, "unsupported_parameter", "pin"),
        ({"source": {"text": "a", "system": "b"}}, 400, "unsupported_parameter", "source"),
        ({"display_name": "a" * 600}, 400, None, "display_name"),
    ],
)
def test_bad_bodies(
    site: Site, body: dict[str, Any], status: int, code: str | None, param: str
) -> None:
    before = len(site.client.get("/v1/documents", params={"limit": 100}).json()["data"])
    body = body if body == {} or "source" in body else {"source": {"text": "x"}, **body}
    reply = site.post(**body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param), error
    assert code in (None, error["code"]), error
    after = len(site.client.get("/v1/documents", params={"limit": 100}).json()["data"])
    assert after == before


def test_too_many(tmp_path: Path) -> None:
    with start_site(tmp_path, jobs={"max_tenant_documents": 2}) as site:
        ids = [site.ingest(text=f"{number} of two. " * 5)["id"] for number in range(2)]
        assert code_of(site.post(source={"text": "one more"})) == (429, "too_many_documents")
        site.client.delete(f"/v1/documents/{ids[0]}")
        site.wait(site.ingest(text="now there is room")["id"])


def test_priority_then_age(site: Site) -> None:
    site.close_gate()
    first = site.ingest(text="Blocks the way. " * 40)["id"]
    site.until(lambda: site.get(first)["status"] == "prefilling")
    ahead = [site.ingest(text=f"{number} is encoded ahead. " * 40)["id"] for number in range(2)]
    for document_id in ahead:
        site.until(lambda name=document_id: site.get(name)["status"] == "tokenizing")
    low, high, later = (
        site.post(source={"text": f"{n}, at {p}. " * 20}, priority=p).json()["id"]
        for n, p in enumerate((-5, 50, 50))
    )
    site.open_gate()
    for document_id in (low, high, later):
        site.wait(document_id)
    begun = [
        next(e["created_at"] for e in site.events(name) if e.get("status") == "tokenizing")
        for name in (first, *ahead, high, later, low)
    ]
    assert begun == sorted(begun)


def test_patch_metadata(site: Site) -> None:
    made = site.post(source={"text": TEXT}, metadata={"a": "1"}, display_name="fox").json()
    assert (made["metadata"], made["display_name"]) == ({"a": "1"}, "fox")
    reply = site.client.patch(f"/v1/documents/{made['id']}", json={"metadata": {"b": 2}})
    assert reply.json()["metadata"] == {"b": 2}
    assert site.wait(made["id"])["metadata"] == {"b": 2}


def test_rewarm(site: Site) -> None:
    document_id = site.ingest(text="Warm it up. " * 60)["id"]
    found = site.wait(document_id)
    assert site.post(f"/{document_id}/rewarm").status_code == 202
    assert site.ingestor.warmed[-1] == document_id
    site.evict(site.hashes_of(document_id)[5:])
    assert site.get(document_id)["status"] == "evicted"
    assert site.post(f"/{document_id}/rewarm").json()["status"] == "queued"
    again = site.wait(document_id)
    assert again["resumed_from_token"] == 5 * 16
    total = found["tokens"]["total"]
    assert again["usage"]["cache_creation_tokens"] == 2 * total - 5 * 16
    events = site.events(document_id)
    warning = next(e for e in events if e["type"] == "warning")
    assert (warning["code"], warning["missed_tokens"]) == ("evicted", (total // 16 - 5) * 16)


def test_what_the_disk_has_lost_is_not_called_evicted(site: Site) -> None:
    document_id = site.ingest(text="Written on sand. " * 60)["id"]
    site.wait(document_id)
    hashes = site.hashes_of(document_id)
    site.running.do(lambda: site.ingestor.damaged.update(hashes[3:5]))
    site.evict(hashes[3:])
    assert site.get(document_id)["status"] == "damaged"
    warning = next(e for e in site.events(document_id) if e["type"] == "warning")
    assert warning["code"] == "damaged"
    assert site.post(f"/{document_id}/rewarm").json()["status"] == "queued"
    assert site.wait(document_id)["status"] == "ready"


def test_eviction_is_noticed_without_asking(site: Site) -> None:
    document_id = site.ingest(text="Lost in silence. " * 40)["id"]
    site.wait(document_id)
    site.evict(site.hashes_of(document_id))

    def status() -> str:
        listed = site.client.get("/v1/documents", params={"limit": 100}).json()["data"]
        return next(d["status"] for d in listed if d["id"] == document_id)

    site.until(lambda: status() == "evicted")


def test_a_small_document_has_nothing_to_keep(site: Site) -> None:
    found = site.wait(site.ingest(text="Tiny")["id"])
    assert found["tokens"]["total"] == len("user: Tiny")
    assert found["residency"] == []


def test_documents_are_offered_without_a_folder(cluster: Any) -> None:
    """They last as long as the process, and their KV as long as the device's memory keeps it."""
    assert cluster.client.get("/v1/documents").json()["data"] == []
    reply = cluster.client.post("/v1/completions", json={"prompt": "a", "document_id": "doc_1"})
    assert code_of(reply) == (404, "document_not_found")
    pin = {"mode": "hard", "ttl": "1h", "tier": "disk"}
    body = {"source": {"text": "a"}, "pin": pin}
    assert cluster.client.post("/v1/documents", json=body).status_code == 400
