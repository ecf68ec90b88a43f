"""How batches are worked on: their rows, and what may go wrong on the way."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator.config import BatchLimits, JobLimits
from coordinator.jobs.batches.batch import Batch, Line, Result, Usage
from coordinator.jobs.batches.lines import LineTable
from coordinator.jobs.batches.output import write_files
from coordinator.jobs.batches.states import BatchEvent
from coordinator.jobs.engine.database import Database
from coordinator.jobs.engine.job import JobEvent
from coordinator.jobs.engine.marks import Marks, boot_id
from coordinator.jobs.engine.suspects import LINE, Work
from coordinator.jobs.engine.table import JobTable
from coordinator.jobs.files.files import Files
from coordinator.jobs.schema import prepare
from protocol.errors import RequestError
from tests.coordinator.conftest import Script
from tests.coordinator.jobs.world import Site, start_site

DOCUMENTS, CHAT = "/v1/documents", "/v1/chat/completions"
NEW = Batch(
    id="batch_1",
    tenant="t",
    created_at=0,
    model="m",
    endpoint=CHAT,
    input_file_id="file-in",
    completion_window="24h",
    expires_at=100,
    keep_until=200,
    output_file_id="file-out",
    error_file_id="file-err",
    output_ttl_s=3600,
)


class Rows:
    """The rows of one batch, which has lines and is in progress."""

    def __init__(self) -> None:
        self.database = Database(None, prepare)
        self.table = JobTable(self.database, Batch, lambda: 1.0, JobLimits())
        self.lines = LineTable(self.database, self.table)

    async def fill(self) -> None:
        lines = [
            Line(1, 0, 10, "d", DOCUMENTS),
            Line(2, 10, 10, "q", CHAT, depends_on=1),
            Line(3, 20, 10, "a", CHAT),
            Line(5, 40, 10, "e", DOCUMENTS),
        ]
        await self.table.insert(NEW, lambda _: None)
        await self.lines.add("batch_1", lines[:2])  # of a validation that was interrupted
        await self.lines.add("batch_1", lines)
        await self.step(BatchEvent.VALID, num_lines=4)

    async def step(self, event: BatchEvent | JobEvent, **changes: Any) -> Batch:
        return await self.table.change("batch_1", lambda batch: batch.after(event, **changes))

    async def batch(self) -> Batch:
        return await self.table.get("t", "batch_1")

    async def claimed(self, *busy: int, takes_documents: bool = True) -> int | None:
        claim = await self.lines.claim("batch_1", busy, takes_documents=takes_documents)
        return None if claim is None else claim.line.number


def with_rows(work: Callable[[Rows], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        rows = Rows()
        await rows.fill()
        await work(rows)
        rows.database.close()

    asyncio.run(run())


def test_lines_are_claimed_in_order_and_after_what_they_depend_on() -> None:
    async def work(rows: Rows) -> None:
        assert await rows.claimed() == 1
        assert await rows.claimed(1) == 3  # the second waits for the first
        assert await rows.claimed(1, 3) == 5
        assert await rows.claimed(1, 3, takes_documents=False) is None
        assert await rows.claimed(1, 3, 5) is None
        await rows.lines.record("batch_1", 1, Result(b"{}", is_error=False, document_id="doc_7"))
        claim = await rows.lines.claim("batch_1", (3, 5), takes_documents=True)
        assert claim is not None
        assert (claim.line, claim.document_id) == (Line(2, 10, 10, "q", CHAT, 1), "doc_7")

    with_rows(work)


def test_a_line_has_one_result_however_often_it_is_answered() -> None:
    async def work(rows: Rows) -> None:
        await rows.lines.record("batch_1", 3, Result(b"first", False, Usage(5, 1, 2)))
        await rows.lines.record("batch_1", 3, Result(b"second", True, Usage(9, 9, 9)))
        batch = await rows.batch()
        assert (batch.num_completed, batch.num_failed, batch.usage) == (1, 0, Usage(5, 1, 2))
        written = await rows.lines.rows("batch_1", 0)
        assert [(row.number, row.text) for row in written] == [
            (1, None),
            (2, None),
            (3, b"first"),
            (5, None),
        ]

    with_rows(work)


def test_nothing_is_recorded_once_a_batch_is_ending() -> None:
    async def work(rows: Rows) -> None:
        await rows.step(JobEvent.CANCEL)
        await rows.lines.record("batch_1", 3, Result(b"late", is_error=False))
        assert [row.text for row in await rows.lines.rows("batch_1", 0)] == [None] * 4
        batch = await rows.batch()
        assert batch.num_completed == 0

    with_rows(work)


def test_files_that_are_written_again_are_the_same(tmp_path: Path) -> None:
    async def work(rows: Rows) -> None:
        files = Files(rows.database, tmp_path, BatchLimits(), lambda: 1.0)
        await rows.lines.record("batch_1", 3, Result(b"answer", is_error=False))
        await rows.lines.record("batch_1", 5, Result(b"error", is_error=True))
        batch = await rows.step(JobEvent.EXPIRE)
        first = await write_files(batch, rows.lines, files)
        (tmp_path / "file-out.new").write_bytes(b"half of the second attempt")
        assert await write_files(batch, rows.lines, files) == first
        assert (tmp_path / "file-out").read_bytes() == b"answer\n"
        errors = (tmp_path / "file-err").read_text().splitlines()
        assert [msgspec.json.decode(line)["custom_id"] for line in errors[:2]] == ["d", "q"]
        assert errors[2] == "error"
        assert [file.expires_at for file in first] == [3601, 3601]

    with_rows(work)


def line(custom_id: str, body: dict[str, Any], url: str = "/v1/completions") -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def test_a_bug_costs_one_line(site: Site) -> None:
    site.server.bugs.append(LookupError("a bug"))
    made = site.batch(
        line("bug", {"source": {"text": "text"}}, DOCUMENTS), line("ok", {"prompt": "x"})
    )
    batch = site.ended(made.id)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 1)
    (entry,) = site.results(batch)[1]
    assert entry["response"]["status_code"] == 500
    assert entry["response"]["body"]["error"]["code"] == "internal_error"


def test_an_answer_waits_for_room_on_the_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with start_site(tmp_path) as site:
        site.running.fake.scripts[95,] = Script(hold_after=2)
        body = {"prompt": [95], "max_tokens": 3000, "logprobs": 20}  # a long answer
        made = site.batch(line("long", body))
        asked = site.server.asked
        site.until(lambda: asked, "it is asked")
        site.pragma("max_page_count = 1")  # as small as the file is
        site.running.fake.release([95])
        site.until(lambda: "cannot be kept for now" in caplog.text, "there is no room")
        assert site.openai.batches.retrieve(made.id).status == "in_progress"
        site.pragma("max_page_count = 1000000")
        assert site.ended(made.id).request_counts.completed == 1
        assert asked == [body]  # it was kept meanwhile, and not asked for again


def test_a_line_that_ends_the_server_each_time_is_set_aside(tmp_path: Path) -> None:
    body = {"prompt": [94], "max_tokens": 3}
    data = str(tmp_path)
    with start_site(tmp_path, data_dir=data) as site:
        site.running.fake.scripts[94,] = Script(hold_after=2)
        made = site.batch(line("held", body), line("other", {"prompt": "x"}))
        site.until(lambda: site.openai.batches.retrieve(made.id).request_counts.completed == 1)
        assert body in site.server.asked
    assert list((tmp_path / "marks").iterdir()) == []  # a stop in order is nobody's fault
    for _ in range(2):
        Marks(tmp_path / "marks", boot_id()).put(Work(LINE, f"{made.id}:1"))
    with start_site(tmp_path, data_dir=data) as site:
        batch = site.ended(made.id)
        assert site.server.asked == []
        (entry,) = site.results(batch)[1]
        assert entry["response"]["body"]["error"]["code"] == "set_aside"
        late = site.client.post(f"/v1/batches/{made.id}/retry")
        assert (late.status_code, late.json()["error"]["code"]) == (409, "not_retryable")


def test_lines_that_failed_are_opened_again() -> None:
    async def work(rows: Rows) -> None:
        await rows.lines.record("batch_1", 1, Result(b"{}", is_error=True))
        await rows.lines.record("batch_1", 3, Result(b"{}", is_error=False))
        batch = await rows.lines.reopen("batch_1", [1, 3])
        assert (batch.num_completed, batch.num_failed) == (1, 0)
        assert await rows.claimed() == 1
        assert await rows.claimed(1) == 5
        await rows.step(JobEvent.CANCEL)
        with pytest.raises(RequestError, match="not answered any more"):
            await rows.lines.reopen("batch_1", [1])

    with_rows(work)


def test_a_batch_that_ends_the_server_each_time_is_set_aside(tmp_path: Path) -> None:
    data = str(tmp_path)
    with start_site(tmp_path, data_dir=data) as site:
        site.running.fake.scripts[94,] = Script(hold_after=2)
        made = site.batch(line("held", {"prompt": [94], "max_tokens": 3}))
        site.until(lambda: site.server.asked, "it is asked")
    for _ in range(2):
        Marks(tmp_path / "marks", boot_id()).put(Work(Batch.KIND, made.id, 1))
    for _ in range(2):  # it stays so
        with start_site(tmp_path, data_dir=data) as site:
            batch = site.ended(made.id, "failed")
            assert batch.errors.data[0].code == "set_aside"
            assert batch.failed_at is not None
            cancelled = site.client.post(f"/v1/batches/{made.id}/cancel")
            assert cancelled.json()["error"]["code"] == "not_cancellable"
    with start_site(tmp_path, data_dir=data) as site:
        assert site.client.post(f"/v1/batches/{made.id}/retry").status_code == 202
        batch = site.ended(made.id)
        assert batch.errors is None
