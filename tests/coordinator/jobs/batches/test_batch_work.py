"""How batches are worked on: their states, their rows, and what may go wrong on the way."""

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator.jobs.batches.batch import Batch, Line, Result, Usage
from coordinator.jobs.batches.output import write_files
from coordinator.jobs.batches.slots import Slots
from coordinator.jobs.batches.states import OPEN, TABLE, BatchEvent, BatchState
from coordinator.jobs.batches.table import SCHEMA, BatchTable
from coordinator.jobs.database import Database
from coordinator.jobs.files import SCHEMA as FILE_SCHEMA
from coordinator.jobs.files import Files
from coordinator.jobs.marks import Marks, boot_id
from coordinator.jobs.suspects import BATCH, LINE, Work
from protocol.errors import IllegalTransition
from tests.coordinator.jobs.batches.composition import config_of

DOCUMENTS, CHAT = "/v1/documents", "/v1/chat/completions"
NEW = Batch("batch_1", "t", "m", CHAT, "file-in", "24h", 0, 100, "file-out", "file-err", 3600)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(BatchState, BatchEvent)))
def test_a_batch_takes_only_the_events_of_its_table(state: BatchState, event: BatchEvent) -> None:
    batch = msgspec.structs.replace(NEW, state=state)
    if (state, event) in TABLE:
        following = batch.stepped(event, 7.9)
        assert following.state is TABLE[state, event]
        is_new = following.state is BatchState.VALIDATING  # which has ``created_at``
        assert following.times == ({} if is_new else {f"{following.state.value}_at": 7})
    else:
        with pytest.raises(IllegalTransition):
            batch.stepped(event, 7.9)


def test_every_open_state_leads_to_an_end() -> None:
    ways = {
        state: {after for (before, _), after in TABLE.items() if before is state}
        for state in BatchState
    }
    for state in BatchState:
        assert bool(ways[state]) is (state in OPEN or state is BatchState.SET_ASIDE)


def with_table(work: Callable[[BatchTable, Database], Coroutine[Any, Any, None]]) -> None:
    """Run ``work`` with the rows of one batch, which has lines and is in progress."""
    lines = [
        Line(1, 0, 10, "d", DOCUMENTS),
        Line(2, 10, 10, "q", CHAT, depends_on=1),
        Line(3, 20, 10, "a", CHAT),
        Line(5, 40, 10, "e", DOCUMENTS),
    ]

    async def run() -> None:
        database = Database(None, FILE_SCHEMA + SCHEMA)
        table = BatchTable(database, lambda: 1.0)
        await table.insert(NEW, 1)
        await table.add_lines("batch_1", lines[:2])  # of a validation that was interrupted
        await table.add_lines("batch_1", lines)
        await table.change("batch_1", lambda batch: batch.stepped(BatchEvent.VALID, 1, num_lines=4))
        await work(table, database)
        database.close()

    asyncio.run(run())


async def claimed(table: BatchTable, *busy: int, takes_documents: bool = True) -> int | None:
    claim = await table.claim("batch_1", busy, takes_documents=takes_documents)
    return None if claim is None else claim.line.number


def test_lines_are_claimed_in_order_and_after_what_they_depend_on() -> None:
    async def work(table: BatchTable, _database: Database) -> None:
        assert await claimed(table) == 1
        assert await claimed(table, 1) == 3  # the second waits for the first
        assert await claimed(table, 1, 3) == 5
        assert await claimed(table, 1, 3, takes_documents=False) is None
        assert await claimed(table, 1, 3, 5) is None
        await table.record("batch_1", 1, Result(b"{}", is_error=False, document_id="doc_7"))
        claim = await table.claim("batch_1", (3, 5), takes_documents=True)
        assert claim is not None
        assert (claim.line, claim.document_id) == (Line(2, 10, 10, "q", CHAT, 1), "doc_7")

    with_table(work)


def test_a_line_has_one_result_however_often_it_is_answered() -> None:
    async def work(table: BatchTable, _database: Database) -> None:
        await table.record("batch_1", 3, Result(b"first", False, Usage(5, 1, 2)))
        await table.record("batch_1", 3, Result(b"second", True, Usage(9, 9, 9)))
        batch = await table.find("batch_1")
        assert batch is not None
        assert (batch.num_completed, batch.num_failed, batch.usage) == (1, 0, Usage(5, 1, 2))
        rows = await table.rows("batch_1", 0)
        assert [(row.number, row.text) for row in rows] == [
            (1, None),
            (2, None),
            (3, b"first"),
            (5, None),
        ]

    with_table(work)


def test_nothing_is_recorded_once_a_batch_is_ending() -> None:
    async def work(table: BatchTable, _database: Database) -> None:
        await table.change("batch_1", lambda batch: batch.stepped(BatchEvent.CANCEL, 1))
        await table.record("batch_1", 3, Result(b"late", is_error=False))
        assert [row.text for row in await table.rows("batch_1", 0)] == [None] * 4
        batch = await table.find("batch_1")
        assert batch is not None
        assert batch.num_completed == 0

    with_table(work)


def test_files_that_are_written_again_are_the_same(tmp_path: Path) -> None:
    async def work(table: BatchTable, database: Database) -> None:
        files = Files(database, tmp_path, config_of(tmp_path, {}).batches, lambda: 1.0)
        await table.record("batch_1", 3, Result(b"answer", is_error=False))
        await table.record("batch_1", 5, Result(b"error", is_error=True))
        batch = await table.change("batch_1", lambda found: found.stepped(BatchEvent.EXPIRE, 1))
        first = await write_files(batch, table, files)
        (tmp_path / "file-out.new").write_bytes(b"half of the second attempt")
        assert await write_files(batch, table, files) == first
        assert (tmp_path / "file-out").read_bytes() == b"answer\n"
        errors = (tmp_path / "file-err").read_text().splitlines()
        assert [msgspec.json.decode(line)["custom_id"] for line in errors[:2]] == ["d", "q"]
        assert errors[2] == "error"
        await table.close("batch_1", first)
        with pytest.raises(IllegalTransition):
            await table.close("batch_1", [])
        assert (await files.get("t", "file-out")).expires_at == 3601

    with_table(work)


def test_slots_go_to_whoever_asked_first_in_a_quiet_moment() -> None:
    async def run() -> None:
        load = [5]
        slots = Slots(1, lambda: load[0] < 3)
        got: list[str] = []

        async def ask(name: str) -> None:
            await slots.acquire()
            got.append(name)

        tasks = [asyncio.create_task(ask(name)) for name in "abc"]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.wait({tasks[0]})
        assert got == []
        load[0] = 0
        await tasks[1]
        assert got == ["b"]
        slots.release()
        await tasks[2]
        assert got == ["b", "c"]

    asyncio.run(run())


def line(custom_id: str, body: dict[str, Any], url: str = "/v1/completions") -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def test_a_bug_costs_one_line(site: Any) -> None:
    made = site.batch(
        line("bug", {"source": {"text": "bug"}}, DOCUMENTS), line("ok", {"prompt": "x"})
    )
    batch = site.wait(made.id)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 1)
    (entry,) = site.results(batch)[1]
    assert entry["response"]["status_code"] == 500
    assert entry["response"]["body"]["error"]["code"] == "internal_error"


def test_an_answer_waits_for_room_on_the_disk(
    start_batches: Any, tmp_path: Path, helpers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with start_batches(tmp_path) as site:
        database = site.coordinator.jobs.database

        def limit(pages: int) -> None:
            query = f"PRAGMA max_page_count = {pages}"
            site.running.do(lambda: database.read(lambda c: c.execute(query).fetchone()))

        site.running.fake.scripts[95,] = helpers.Script(hold_after=2)
        body = {"prompt": [95], "max_tokens": 3000, "logprobs": 20}  # a long answer
        made = site.batch(line("long", body))
        asked = site.coordinator.server.asked
        site.until(lambda: asked, "it is asked")
        limit(1)  # as small as the file is
        site.running.fake.release([95])
        site.until(lambda: "cannot be kept for now" in caplog.text, "there is no room")
        assert site.openai.batches.retrieve(made.id).status == "in_progress"
        limit(1 << 30)
        assert site.wait(made.id).request_counts.completed == 1
        assert asked == [body]  # it was kept meanwhile, and not asked for again


def test_a_line_that_ends_the_server_each_time_is_set_aside(
    start_batches: Any, tmp_path: Path, helpers: Any
) -> None:
    body = {"prompt": [94], "max_tokens": 3}
    with start_batches(tmp_path) as site:
        site.running.fake.scripts[94,] = helpers.Script(hold_after=2)
        made = site.batch(line("held", body), line("other", {"prompt": "x"}))
        site.until(lambda: site.openai.batches.retrieve(made.id).request_counts.completed == 1)
        assert body in site.coordinator.server.asked
    assert list((tmp_path / "marks").iterdir()) == []  # a stop in order is nobody's fault
    for _ in range(2):
        Marks(tmp_path / "marks", boot_id()).put(Work(LINE, f"{made.id}:1"))
    with start_batches(tmp_path) as site:
        batch = site.wait(made.id)
        assert site.coordinator.server.asked == []
        (entry,) = site.results(batch)[1]
        assert entry["response"]["body"]["error"]["code"] == "set_aside"
        late = site.http.post(f"/v1/batches/{made.id}/retry")
        assert (late.status_code, late.json()["error"]["code"]) == (409, "not_retryable")


def test_lines_that_failed_are_opened_again() -> None:
    async def work(table: BatchTable, _database: Database) -> None:
        await table.record("batch_1", 1, Result(b"{}", is_error=True))
        await table.record("batch_1", 3, Result(b"{}", is_error=False))
        batch = await table.reopen("batch_1", [1, 3])
        assert (batch.num_completed, batch.num_failed) == (1, 0)
        assert await claimed(table) == 1
        assert await claimed(table, 1) == 5
        await table.change("batch_1", lambda found: found.stepped(BatchEvent.CANCEL, 2))
        with pytest.raises(IllegalTransition):
            await table.reopen("batch_1", [1])

    with_table(work)


@pytest.mark.parametrize("position", [0, 1])
def test_a_batch_that_ends_the_server_each_time_is_set_aside(
    start_batches: Any, tmp_path: Path, helpers: Any, position: int
) -> None:
    with start_batches(tmp_path) as site:
        site.running.fake.scripts[94,] = helpers.Script(hold_after=2)
        made = site.batch(line("held", {"prompt": [94], "max_tokens": 3}))
        site.until(lambda: site.coordinator.server.asked, "it is asked")
    for _ in range(2):
        Marks(tmp_path / "marks", boot_id()).put(Work(BATCH, made.id, position))
    for _ in range(2):  # it stays so
        with start_batches(tmp_path) as site:
            batch = site.wait(made.id, "failed")
            assert batch.errors.data[0].code == "set_aside"
            assert batch.failed_at is not None
            cancelled = site.http.post(f"/v1/batches/{made.id}/cancel")
            assert cancelled.json()["error"]["code"] == "not_cancellable"
    with start_batches(tmp_path) as site:
        assert site.http.post(f"/v1/batches/{made.id}/retry").status_code == 202
        batch = site.wait(made.id)
        assert batch.errors is None
