"""The table of jobs: what a change writes and leaves, and what earlier versions have written."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator.config import BatchLimits, JobLimits
from coordinator.jobs.batches.batch import Batch, describe_batch
from coordinator.jobs.batches.lines import LineTable
from coordinator.jobs.batches.states import BatchEvent
from coordinator.jobs.documents.document import Document
from coordinator.jobs.documents.states import DocumentEvent, DocumentState
from coordinator.jobs.engine.database import Database
from coordinator.jobs.engine.job import Failure, JobEvent, Notice
from coordinator.jobs.engine.table import Idempotency, JobTable
from coordinator.jobs.files.files import Files
from coordinator.jobs.schema import prepare
from protocol.errors import ConfigError, IllegalTransition, RequestError

LIMITS = JobLimits()
VERSION_1 = Path(__file__).with_name("version1.sql")


def document(number: int, tenant: str = "t", **fields: Any) -> Document:
    made = {"cache_salt": "", "created_at": 0.0, "kind": "text", **fields}
    return Document(id=f"doc_{number}", tenant=tenant, **made)


def with_documents(
    work: Callable[[JobTable[Document], Database], Awaitable[None]], limits: JobLimits = LIMITS
) -> None:
    async def run() -> None:
        database = Database(None, prepare)
        await work(JobTable(database, Document, lambda: 7.5, limits), database)
        database.close()

    asyncio.run(run())


async def put(table: JobTable[Document], *documents: Document) -> None:
    for one in documents:
        await table.insert(one, lambda _: None)


def test_a_change_writes_the_state_its_time_and_its_event_or_nothing() -> None:
    async def work(table: JobTable[Document], _database: Database) -> None:
        await put(table, document(1))
        told = Notice("warning", {"code": "x"})
        made = await table.change("doc_1", lambda d: d.after(DocumentEvent.START, attempt=1), told)
        assert made == await table.get("t", "doc_1")
        assert (made.state, made.times) == (DocumentState.TOKENIZING, {"tokenizing": 7.5})
        assert await table.change("doc_1", lambda _: None, told) == made
        with pytest.raises(IllegalTransition):
            await table.change("doc_1", lambda d: d.after(DocumentEvent.STORED), told)

        def refuse(_connection: sqlite3.Connection, _after: Document) -> None:
            raise RequestError("no", code="no")

        with pytest.raises(RequestError):
            await table.change("doc_1", lambda d: d.after(JobEvent.CANCEL), told, also=refuse)
        assert await table.get("t", "doc_1") == made
        events = await table.events("doc_1", 0)
        assert [(e.sequence, e.kind) for e in events] == [
            (1, "state"),
            (2, "warning"),
            (3, "state"),
        ]
        assert events[2].data == {"status": "tokenizing", "attempt": 1}

    with_documents(work)


def test_the_oldest_events_of_a_job_go() -> None:
    async def work(table: JobTable[Document], _database: Database) -> None:
        await put(table, document(1))
        for number in range(5):
            await table.change("doc_1", lambda d: d, Notice("progress", {"n": number}))
        assert [event.sequence for event in await table.events("doc_1", 0)] == [4, 5, 6]

    with_documents(work, JobLimits(max_events=3))


def test_what_waits_is_given_in_turns_of_the_tenants() -> None:
    async def work(table: JobTable[Document], _database: Database) -> None:
        await put(
            table,
            *(document(number, "many") for number in range(3)),
            document(3, "few"),
            document(4, "many", priority=1),
        )
        await table.change("doc_1", lambda d: d.after(DocumentEvent.START))
        waiting = [one.id for one in await table.waiting(2)]
        assert waiting == ["doc_3", "doc_4", "doc_0"]

    with_documents(work)


def test_what_is_deleted_or_has_ended_is_left_to_be_cleaned_up() -> None:
    async def work(table: JobTable[Document], database: Database) -> None:
        batches = JobTable(database, Batch, lambda: 7.5, LIMITS)
        await put(table, document(1))
        await table.delete("doc_1")
        assert await table.select("job_id = 'doc_1'") == []
        assert await table.events("doc_1", 0) == []
        assert [one.id for one in await table.cleanups()] == ["doc_1"]
        assert await table.ids() == {"doc_1"}
        await batches.insert(batch(), lambda _: None)
        await batches.change("batch_1", lambda b: b.after(JobEvent.CANCEL))
        assert await batches.cleanups() == []
        ended = await batches.change("batch_1", lambda b: b.after(BatchEvent.WRITTEN))
        assert await batches.cleanups() == [ended]
        await batches.cleaned_up("batch_1")
        await table.cleaned_up("doc_1")
        assert await table.ids() == {"batch_1"}
        assert await batches.get("t", "batch_1") == ended

    with_documents(work)


def batch() -> Batch:
    return Batch(
        id="batch_1",
        tenant="t",
        created_at=0,
        model="m",
        endpoint="/v1/completions",
        input_file_id="file-in",
        completion_window="24h",
        expires_at=100,
        keep_until=200,
        output_file_id="file-out",
        error_file_id="file-err",
        output_ttl_s=3600,
    )


# -- versions --------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A database as version 1 has written it, with a deletion and a batch that was set aside."""
    path = tmp_path / "jobs.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(VERSION_1.read_text())
    connection.execute(
        "INSERT INTO deleted_documents SELECT 'doc_gone', replace(body, document_id, 'doc_gone')"
        " FROM documents WHERE status = 'cancelled'"
    )
    errors = '"errors":[{"code":"set_aside","message":"twice","line":null,"param":null}]'
    connection.execute(
        "INSERT INTO batch SELECT 9, 'batch_aside', tenant, 2, expires_at, CAST(replace(replace("
        "replace(fields, batch_id, 'batch_aside'), '\"in_progress\",', '\"set_aside\",'),"
        f" '\"errors\":[]', '{errors}') AS BLOB) FROM batch WHERE is_open = 1"
    )
    connection.execute(
        "INSERT INTO documents VALUES (9, 'doc_torn', 'default', 'ready', 0, NULL, 'none', 0, 5,"
        " 'h', X'7B')"
    )
    connection.commit()
    connection.close()
    return path


def test_a_database_of_version_1_is_converted(old: Path) -> None:
    async def run() -> None:
        database = Database(old, prepare)
        documents = JobTable(database, Document, lambda: 7.5, LIMITS)
        batches = JobTable(database, Batch, lambda: 7.5, LIMITS)
        found, _ = await documents.page("default", None, 10, is_ascending=True)
        states = ["ready", "ready", "prefilling", "tokenizing", "cancelled"]
        assert [one.state.value for one in found] == states
        first = found[0]
        assert (first.display_name, first.pin.mode, first.num_bytes) == ("ready", "hard", 1120)
        assert int(first.times["ready"]) == 1796055004
        events = await documents.events(first.id, 0)
        assert [event.sequence for event in events] == list(range(1, 11))
        assert events[-1].data["status"] == "ready"
        again = Idempotency("k", b"another digest")
        with pytest.raises(RequestError, match="used for another request"):
            await documents.insert(document(1, "default"), lambda _: None, again)
        assert [one.id for one in await documents.cleanups()] == ["doc_gone"]
        with pytest.raises(RequestError, match="cannot be read"):
            await documents.get("default", "doc_torn")

        kept, _ = await batches.page("default", None, 10, is_ascending=True)
        states = ["completed", "in_progress", "failed", "set_aside"]
        assert [one.state.value for one in kept] == states
        done = describe_batch(kept[0])
        assert (done["in_progress_at"], done["completed_at"]) == (1796055012, 1796055012)
        assert done["metadata"] == {"x": "y"}
        assert kept[3].error == Failure("set_aside", "twice")
        assert len(await batches.cleanups()) == 2
        lines = LineTable(database, batches)
        assert [row.text is None for row in await lines.rows(kept[1].id, 0)] == [False] * 5 + [True]
        claim = await lines.claim(kept[1].id, (), takes_documents=True)
        assert claim is not None and claim.line.custom_id == "held"

        files = Files(database, old.with_name("files"), BatchLimits(), lambda: 7.5)
        page, _ = await files.page("default", None, 10, is_ascending=True)
        assert [file.file_name for file in page[:2]] == ["page", "b.jsonl"]
        assert (page[0].media_type, page[0].charset) == ("text/html", "utf-8")
        broken = "PRAGMA foreign_key_check"
        assert await database.read(lambda c: c.execute(broken).fetchall()) == []
        database.close()
        Database(old, prepare).close()  # it is converted once

    asyncio.run(run())


def test_what_is_of_a_newer_version_is_refused_and_so_is_this_one_by_an_older(old: Path) -> None:
    Database(old, prepare).close()
    connection = sqlite3.connect(old)
    statements = VERSION_1.read_text().replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS")
    with pytest.raises(sqlite3.OperationalError, match="views may not be indexed"):
        for statement in statements.splitlines():
            if statement.startswith("CREATE"):
                connection.execute(statement)
    connection.execute("PRAGMA user_version = 3")
    connection.close()
    with pytest.raises(ConfigError, match="newer version"):
        Database(old, prepare)
