"""``/v1/files`` over real HTTP: what is stored, what is refused, and that nothing is left over."""

import asyncio
import io
import random
import socket
from pathlib import Path
from typing import Any

import openai
import pytest

from coordinator.config import BatchLimits
from coordinator.jobs.engine.database import Database
from coordinator.jobs.files.files import Files
from coordinator.jobs.schema import prepare
from tests.coordinator.jobs.world import Site, start_site

BOUNDARY = "xyz"
HEAD = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    shown = "" if filename is None else f'; filename="{filename}"'
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{shown}\r\n\r\n'
    return head.encode() + value + b"\r\n"


PURPOSE = part("purpose", b"batch")
END = f"--{BOUNDARY}--\r\n".encode()


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + END


def check_error(reply: Any, status: int, code: str) -> None:
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["code"] == code, reply.text


def test_the_life_of_a_file_with_openais_client(site: Site) -> None:
    data = random.Random(1).randbytes(3 << 20)  # several pieces, and every byte
    made = site.openai.files.create(file=("a b.jsonl", data), purpose="batch")
    assert (made.object, made.bytes, made.filename) == ("file", len(data), "a b.jsonl")
    assert (made.purpose, made.status) == ("batch", "processed")
    assert made.expires_at == made.created_at + 30 * 86400
    assert site.openai.files.retrieve(made.id) == made
    assert site.openai.files.content(made.id).content == data
    assert made.id in [file.id for file in site.openai.files.list()]
    assert made.id in site.stored()
    gone = site.openai.files.delete(made.id)
    assert (gone.id, gone.deleted) == (made.id, True)
    assert made.id not in site.stored()
    for ask in (site.openai.files.retrieve, site.openai.files.content, site.openai.files.delete):
        with pytest.raises(openai.NotFoundError):
            ask(made.id)


def test_pages(site: Site) -> None:
    files = [
        site.openai.files.create(file=(f"{n}", b"x"), purpose="user_data").id for n in range(5)
    ]
    listed = site.openai.files.list(limit=2, order="asc", purpose="user_data")
    assert [file.id for file in listed] == files  # the client turns the pages
    newest = site.client.get("/v1/files", params={"limit": 2, "purpose": "user_data"}).json()
    assert [file["id"] for file in newest["data"]] == files[:2:-1]
    assert (newest["has_more"], newest["last_id"]) == (True, files[3])
    after = site.client.get("/v1/files", params={"after": files[1], "purpose": "user_data"}).json()
    assert [file["id"] for file in after["data"]] == [files[0]]
    for file_id in files:
        site.openai.files.delete(file_id)
    assert site.client.get("/v1/files?purpose=user_data").json()["data"] == []


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=-1", "limit=x", "order=up", "limit=%C2%B2", "limit=1.5"]
)
def test_a_wrong_page(site: Site, query: str) -> None:
    check_error(site.client.get(f"/v1/files?{query}"), 400, "invalid_value")


def test_a_page_after_a_file_that_is_not_there(site: Site) -> None:
    check_error(site.client.get("/v1/files?after=file-0"), 404, "file_not_found")


def test_names_are_made_plain_and_an_empty_file_is_one(site: Site) -> None:
    for given, shown in [
        ("../../etc/passwd", "passwd"),
        ("C:\\x\\y.txt", "y.txt"),
        ("\u00e4\u4e2d.txt", "\u00e4\u4e2d.txt"),
        ("a\u202eb", "a_b"),
        ("/", "file"),
        ("n" * 300, "n" * 255),
    ]:
        body = form(PURPOSE, part("file", b"", given))
        reply = site.client.post("/v1/files", content=body, headers=HEAD)
        assert reply.status_code == 200, reply.text
        assert (reply.json()["filename"], reply.json()["bytes"]) == (shown, 0)
        got = site.client.get(f"/v1/files/{reply.json()['id']}/content")
        assert (got.status_code, got.content) == (200, b"")
        site.openai.files.delete(reply.json()["id"])


FILE = part("file", b"x", "x")
REFUSED: list[tuple[bytes, str]] = [
    (b"", "invalid_multipart"),
    (b"no form", "invalid_multipart"),
    (PURPOSE + FILE, "invalid_multipart"),
    (PURPOSE + FILE[:-20], "invalid_multipart"),
    (b"--xyz\r\n\r\nx\r\n" + END, "invalid_multipart"),
    (b"--xyz\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + END, "invalid_multipart"),
    (b"--xyz\r\n" + b"h: v\r\n" * 10_000, "invalid_multipart"),
    (b"--xyz\r\n" + b"h" * 10_000, "invalid_multipart"),
    (form(PURPOSE), "missing_required_parameter"),
    (form(FILE), "missing_required_parameter"),
    (form(PURPOSE, part("file", b"x")), "missing_required_parameter"),
    (form(PURPOSE, FILE, FILE), "invalid_value"),
    (form(PURPOSE, part("other", b"x", "x")), "invalid_value"),
    (form(part("purpose", b"steal"), FILE), "invalid_value"),
    (form(PURPOSE, PURPOSE, FILE), "duplicate_key"),
    (form(*(part(f"f{n}", b"x") for n in range(40)), FILE), "too_large"),
    (form(part("purpose", b"b" * 70_000), FILE), "too_large"),
    (form(part("purpose", b"\xff"), FILE), "invalid_encoding"),
    (form(PURPOSE, part("expires_after[anchor]", b"now"), FILE), "invalid_value"),
    (
        form(
            PURPOSE,
            part("expires_after[anchor]", b"created_at"),
            part("expires_after[seconds]", b"9" * 400),
            FILE,
        ),
        "invalid_value",
    ),
]


@pytest.mark.parametrize(("body", "code"), REFUSED, ids=lambda value: repr(value)[:30])
def test_a_refused_upload_leaves_nothing(site: Site, body: bytes, code: str) -> None:
    before = site.stored()
    check_error(site.client.post("/v1/files", content=body, headers=HEAD), 400, code)
    assert site.stored() == before


@pytest.mark.parametrize(
    ("path", "content_type", "status", "code"),
    [
        ("/v1/files", "application/json", 415, "unsupported_media_type"),
        ("/v1/completions", "multipart/form-data; boundary=x", 415, "unsupported_media_type"),
        ("/v1/files/x", "multipart/form-data; boundary=x", 415, "unsupported_media_type"),
        ("/v1/files", "multipart/form-data", 400, "invalid_multipart"),
        ("/v1/files", f"multipart/form-data; boundary={'b' * 300}", 400, "invalid_multipart"),
    ],
)
def test_the_type_of_the_body(
    site: Site, path: str, content_type: str, status: int, code: str
) -> None:
    body = form(PURPOSE, FILE)
    headers = {"content-type": content_type}
    check_error(site.client.post(path, content=body, headers=headers), status, code)


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_too_large_upload(site: Site, is_chunked: bool) -> None:
    body = form(PURPOSE, part("file", bytes(5 << 20), "x"))
    content: Any = iter([body[i : i + 65536] for i in range(0, len(body), 65536)])
    before = site.stored()
    reply = site.client.post("/v1/files", content=content if is_chunked else body, headers=HEAD)
    check_error(reply, 413, "body_too_large")
    assert site.stored() == before


def test_json_keeps_its_own_limit(tmp_path: Path) -> None:
    limits = {"max_body_bytes": 1000}
    with start_site(tmp_path, limits=limits) as site:
        made = site.openai.files.create(file=("x", bytes(5000)), purpose="batch")
        assert made.bytes == 5000
        check_error(
            site.client.post("/v1/completions", json={"prompt": "x" * 2000}), 413, "body_too_large"
        )


def test_a_sender_that_goes_or_pauses_leaves_nothing(site: Site) -> None:
    before = site.stored()
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: {HEAD['content-type']}\r\n"
        f"Content-Length: 3000000\r\n\r\n"
    ).encode()
    address = (site.client.base_url.host, site.client.base_url.port)
    begun = head + PURPOSE + part("file", bytes(2 << 20), "x")
    with socket.create_connection(address) as gone:
        gone.sendall(begun)
        site.until(lambda: len(site.stored()) > len(before), "it is being written")
    site.until(lambda: site.stored() == before, "it is removed")
    with socket.create_connection(address) as pausing:
        pausing.sendall(begun)
        assert b" 408 " in pausing.recv(1000)
    site.until(lambda: site.stored() == before, "it is removed")


def test_a_full_disk_refuses_before_anything_is_taken(tmp_path: Path) -> None:
    with start_site(tmp_path, batches={"min_free_bytes": 1 << 60}) as site:
        reply = site.client.post("/v1/files", content=form(PURPOSE, FILE), headers=HEAD)
        check_error(reply, 507, "insufficient_storage")
        check_error(site.post(source={"text": "x"}), 507, "insufficient_storage")
        assert site.stored() == site.client.get("/v1/documents").json()["data"] == []
        assert site.client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_tenants_see_their_own(tmp_path: Path) -> None:
    with start_site(tmp_path, api_keys=("one", "two"), batches={"max_files": 2}) as site:
        made = site.openai.files.create(file=("x", b"x"), purpose="batch")
        other = site.openai.with_options(api_key="two")
        assert list(other.files.list()) == []
        for ask in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError):
                ask(made.id)
        site.openai.files.create(file=io.BytesIO(b"y"), purpose="batch")
        with pytest.raises(openai.RateLimitError):
            site.openai.files.create(file=("z", b"z"), purpose="batch")
        other.files.create(file=("z", b"z"), purpose="batch")
        assert len(site.stored()) == 3


def test_expiry(tmp_path: Path) -> None:
    with start_site(tmp_path) as site:
        files = site.openai.files
        soon = files.create(
            file=("x", b"x"),
            purpose="user_data",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
        assert soon.expires_at == soon.created_at + 3600
        kept = files.create(file=("y", b"y"), purpose="user_data")
        assert kept.expires_at is None
        site.clock.offset_s = 3601
        with pytest.raises(openai.NotFoundError):
            files.retrieve(soon.id)
        assert [file.id for file in files.list()] == [kept.id]
        site.running.do(site.running.coordinator.jobs.files.remove_expired)
        assert site.stored() == [kept.id]


def test_after_a_restart_files_are_there_and_strangers_are_not(tmp_path: Path) -> None:
    data = str(tmp_path)
    with start_site(tmp_path, data_dir=data) as site:
        made = site.openai.files.create(file=("x", b"content"), purpose="batch")
        (tmp_path / "files/0123.upload").write_bytes(b"half")
    with start_site(tmp_path, data_dir=data) as site:
        assert site.openai.files.retrieve(made.id) == made
        assert site.openai.files.content(made.id).content == b"content"
        site.until(lambda: site.stored() == [made.id], "the stranger is removed")


def test_what_arrives_during_the_recovery_is_no_stranger(tmp_path: Path) -> None:
    async def run() -> None:
        (tmp_path / "file-left").write_bytes(b"by a crash")
        database = Database(None, prepare)
        files = Files(database, tmp_path, BatchLimits(), lambda: 1.0)
        (tmp_path / "file-new").write_bytes(b"moved, and about to be written down")
        await files.recover()
        database.close()

    asyncio.run(run())
    assert [path.name for path in tmp_path.iterdir()] == ["file-new"]
