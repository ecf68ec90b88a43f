"""The rows of batches. What changes together is one transaction, and durable when it returns.

Of a line that is done there is one result, keyed by (batch, line): a second answer, of a line that
was run again, is ignored, and is not counted. ``is_open`` is 0 of a batch that has ended, 1 of one
for which something is to be done, 2 of one that is set aside.
"""

import sqlite3
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import msgspec

from coordinator.jobs.batches.batch import DOCUMENTS, Batch, Claim, Line, LineError, Result
from coordinator.jobs.batches.states import OPEN, BatchEvent, BatchState
from coordinator.jobs.database import Database
from coordinator.jobs.files import StoredFile, insert_file
from coordinator.requests.admission import Departures, Queue
from protocol.errors import IllegalTransition, RequestError

SCHEMA = (
    """CREATE TABLE IF NOT EXISTS batch (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        batch_id TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL,
        is_open INTEGER NOT NULL,
        expires_at INTEGER NOT NULL,
        fields BLOB NOT NULL
    )""",
    "CREATE INDEX IF NOT EXISTS batch_of_tenant ON batch (tenant, sequence)",
    "CREATE INDEX IF NOT EXISTS batch_expiry ON batch (is_open, expires_at)",
    """CREATE TABLE IF NOT EXISTS batch_line (
        batch_id TEXT NOT NULL REFERENCES batch (batch_id) ON DELETE CASCADE,
        line INTEGER NOT NULL,
        offset INTEGER NOT NULL,
        size INTEGER NOT NULL,
        custom_id TEXT NOT NULL,
        url TEXT NOT NULL,
        depends_on INTEGER,
        is_done INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (batch_id, line)
    ) WITHOUT ROWID""",
    "CREATE INDEX IF NOT EXISTS batch_line_left ON batch_line (batch_id, line) WHERE is_done = 0",
    """CREATE TABLE IF NOT EXISTS batch_result (
        batch_id TEXT NOT NULL REFERENCES batch (batch_id) ON DELETE CASCADE,
        line INTEGER NOT NULL,
        is_error INTEGER NOT NULL,
        document_id TEXT,
        text BLOB NOT NULL,
        PRIMARY KEY (batch_id, line)
    )""",
)
LINES_AT_ONCE = 5000  # other writers wait no longer than for so many
ROWS_AT_ONCE = 500
_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Batch)


@dataclass(frozen=True, slots=True)
class Written:
    """One row of a batch's files: a line and its result, if it has one."""

    number: int
    custom_id: str
    text: bytes | None
    is_error: bool


class BatchTable:
    """All batches.

    Args:
        database: made with this schema and that of the files.
        clock: Unix time.
    """

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._database = database
        self._departures = Departures()
        self._queue = Queue()

    # -- batches -----------------------------------------------------------------------------------

    async def insert(self, batch: Batch, max_open: int, max_all_open: int = 1_000) -> None:
        """A new batch.

        Raises:
            RequestError: its tenant has too many, or all together have.
        """

        def work(connection: sqlite3.Connection) -> None:
            query = (
                "SELECT count(*), count(*) FILTER (WHERE tenant = ?) FROM batch WHERE is_open = 1"
            )
            everybody, own = connection.execute(query, (batch.tenant,)).fetchone()
            if own >= max_open or everybody >= max_all_open:
                now = self.clock()
                raise RequestError(
                    f"{own if own >= max_open else everybody} batches are under way: wait for one, "
                    f"or cancel one",
                    code="too_many_batches",
                    status=429 if own >= max_open else 503,
                    retry_after_s=self._queue.retry_after_s(1, self._departures.per_s(now), now),
                )
            connection.execute(
                "INSERT INTO batch (batch_id, tenant, is_open, expires_at, fields) "
                "VALUES (?, ?, 1, ?, ?)",
                (batch.batch_id, batch.tenant, batch.expires_at, _ENCODER.encode(batch)),
            )

        await self._database.write(work, "batch_added")

    async def find(self, batch_id: str) -> Batch | None:
        return await self._database.read(lambda connection: _find(connection, batch_id))

    async def page(self, tenant: str, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """A tenant's batches, the newest first, and whether there are more."""

        def work(connection: sqlite3.Connection) -> list[bytes]:
            query = (
                "SELECT fields FROM batch WHERE tenant = :tenant AND (:after IS NULL OR sequence < "
                "(SELECT sequence FROM batch WHERE batch_id = :after AND tenant = :tenant)) "
                "ORDER BY sequence DESC LIMIT :limit"
            )
            values = {"tenant": tenant, "after": after, "limit": limit + 1}
            return [fields for (fields,) in connection.execute(query, values)]

        found = [_DECODER.decode(fields) for fields in await self._database.read(work)]
        return found[:limit], len(found) > limit

    async def open_ids(self) -> list[str]:
        """Batches for which something is to be done, the oldest first."""
        query = "SELECT batch_id FROM batch WHERE is_open = 1 ORDER BY sequence"
        rows = await self._database.read(lambda c: c.execute(query).fetchall())
        return [batch_id for (batch_id,) in rows]

    async def set_aside_ids(self) -> list[str]:
        """Batches that wait for somebody to ask for them again."""
        query = "SELECT batch_id FROM batch WHERE is_open = 2"
        rows = await self._database.read(lambda c: c.execute(query).fetchall())
        return [batch_id for (batch_id,) in rows]

    async def expired_ids(self) -> list[str]:
        """Open batches whose time is over."""
        query = "SELECT batch_id FROM batch WHERE is_open = 1 AND expires_at <= ?"
        now = int(self.clock())
        rows = await self._database.read(lambda c: c.execute(query, (now,)).fetchall())
        return [batch_id for (batch_id,) in rows]

    async def change(self, batch_id: str, work: Callable[[Batch], Batch]) -> Batch:
        """Replace a batch by what ``work`` makes of it.

        Raises:
            IllegalTransition: of ``work``; then nothing has changed.
        """
        return await self._database.write(lambda c: _change(c, batch_id, work), "batch_changed")

    async def forget(self, before: int) -> None:
        """Remove the batches that ended, and expired, before a time."""
        query = "DELETE FROM batch WHERE is_open <> 1 AND expires_at < ?"
        await self._database.write(lambda c: c.execute(query, (before,)), "batches_forgotten")

    # -- lines -------------------------------------------------------------------------------------

    async def add_lines(self, batch_id: str, lines: Sequence[Line]) -> None:
        """The lines of a batch that is being validated, instead of those of an earlier attempt."""
        await self.remove_lines(batch_id)
        query = (
            "INSERT INTO batch_line (batch_id, line, offset, size, custom_id, url, depends_on) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)"
        )
        for start in range(0, len(lines), LINES_AT_ONCE):
            some = lines[start : start + LINES_AT_ONCE]
            await self._write_rows(
                query, [(batch_id, *msgspec.structs.astuple(line)) for line in some]
            )

    async def _write_rows(self, query: str, rows: Sequence[tuple[object, ...]]) -> None:
        await self._database.write(lambda c: c.executemany(query, rows), "lines_added")

    async def claim(
        self, batch_id: str, busy: Collection[int], *, takes_documents: bool
    ) -> Claim | None:
        """The first line that can be answered now, and is not ``busy``.

        Args:
            batch_id: which batch.
            busy: lines that are being answered.
            takes_documents: whether it may be one that makes a document.
        """

        def work(connection: sqlite3.Connection) -> Claim | None:
            marks = ",".join("?" * len(busy))
            query = (
                "SELECT l.line, l.offset, l.size, l.custom_id, l.url, l.depends_on, "
                "made.document_id "
                "FROM batch_line l INDEXED BY batch_line_left "
                "LEFT JOIN batch_result made "
                "ON made.batch_id = l.batch_id AND made.line = l.depends_on "
                "WHERE l.batch_id = ? AND l.is_done = 0 AND (? OR l.url <> ?) "
                "AND (l.depends_on IS NULL OR made.line IS NOT NULL) "
                f"AND l.line NOT IN ({marks}) ORDER BY l.line LIMIT 1"
            )
            values = (batch_id, takes_documents, DOCUMENTS, *busy)
            row = connection.execute(query, values).fetchone()
            if row is None:
                return None
            *line, document_id = row
            return Claim(Line(*line), document_id)

        return await self._database.read(work)

    async def reopen(self, batch_id: str, numbers: Collection[int]) -> Batch:
        """Have lines answered again that have failed; the batch is running.

        Raises:
            IllegalTransition: it is not.
        """

        def work(connection: sqlite3.Connection) -> Batch:
            marks = ",".join("?" * len(numbers))
            where = f"batch_id = ? AND line IN ({marks})"
            values = (batch_id, *numbers)
            failed = connection.execute(
                f"DELETE FROM batch_result WHERE {where} AND is_error RETURNING line", values
            ).fetchall()
            for (number,) in failed:
                connection.execute(
                    "UPDATE batch_line SET is_done = 0 WHERE batch_id = ? AND line = ?",
                    (batch_id, number),
                )
            return _change(connection, batch_id, lambda batch: _reopened(batch, len(failed)))

        return await self._database.write(work, "batch_changed")

    async def record(self, batch_id: str, number: int, result: Result) -> None:
        """Keep the answer to a line, unless there is one, or the batch is ending."""

        def work(connection: sqlite3.Connection) -> None:
            batch = _find(connection, batch_id)
            if batch is None or batch.state is not BatchState.IN_PROGRESS:
                return
            done = connection.execute(
                "UPDATE batch_line SET is_done = 1 WHERE batch_id = ? AND line = ? AND is_done = 0",
                (batch_id, number),
            )
            if done.rowcount == 0:
                return  # it was run twice
            connection.execute(
                "INSERT OR IGNORE INTO batch_result (batch_id, line, is_error, document_id, text) "
                "VALUES (?, ?, ?, ?, ?)",
                (batch_id, number, result.is_error, result.document_id, result.text),
            )
            _change(connection, batch_id, lambda batch: _counted(batch, result))

        await self._database.write(work, "line_answered")

    async def rows(self, batch_id: str, after: int) -> list[Written]:
        """Lines behind a number, in their order, with their results; empty at the end."""
        query = (
            "SELECT l.line, l.custom_id, r.text, r.is_error FROM batch_line l "
            "LEFT JOIN batch_result r ON r.batch_id = l.batch_id AND r.line = l.line "
            "WHERE l.batch_id = ? AND l.line > ? ORDER BY l.line LIMIT ?"
        )
        values = (batch_id, after, ROWS_AT_ONCE)
        rows = await self._database.read(lambda c: c.execute(query, values).fetchall())
        return [
            Written(number, custom_id, text, bool(is_error))
            for number, custom_id, text, is_error in rows
        ]

    async def remove_lines(self, batch_id: str) -> None:
        """Lines and results of a batch whose files are written, or whose lines are to be new."""
        for table in ("batch_result", "batch_line"):
            query = (
                f"DELETE FROM {table} WHERE batch_id = :batch AND line IN "
                f"(SELECT line FROM {table} WHERE batch_id = :batch LIMIT :most)"
            )
            values = {"batch": batch_id, "most": ROWS_AT_ONCE}
            while await self._remove_some(query, values):
                pass

    async def _remove_some(self, query: str, values: dict[str, object]) -> int:
        return await self._database.write(
            lambda c: c.execute(query, values).rowcount, "lines_removed"
        )

    async def leftovers(self) -> list[str]:
        """Ended batches that have lines still: the process ended before they were removed."""
        query = (
            "SELECT DISTINCT l.batch_id FROM batch_line l JOIN batch b ON b.batch_id = l.batch_id "
            "WHERE b.is_open = 0"
        )
        rows = await self._database.read(lambda c: c.execute(query).fetchall())
        return [batch_id for (batch_id,) in rows]

    # -- ends --------------------------------------------------------------------------------------

    async def refuse(self, batch_id: str, errors: Sequence[LineError]) -> None:
        """The input is not usable. Nothing happens if it is being cancelled."""
        now = self.clock()

        def work(batch: Batch) -> Batch:
            if batch.state is not BatchState.VALIDATING:
                return batch
            return batch.stepped(BatchEvent.REFUSE, now, errors=tuple(errors))

        await self.change(batch_id, work)

    async def close(self, batch_id: str, files: Sequence[StoredFile]) -> None:
        """The batch's files are written: they can be seen, and it is over."""
        now = self.clock()

        def work(connection: sqlite3.Connection) -> None:
            for file in files:
                insert_file(connection, file)
            names = {file.file_id for file in files}
            _change(
                connection,
                batch_id,
                lambda batch: batch.stepped(
                    BatchEvent.WRITTEN,
                    now,
                    has_output=batch.output_file_id in names,
                    has_errors=batch.error_file_id in names,
                ),
            )

        await self._database.write(work, "batch_closed")
        self._departures.ended(now)


def _find(connection: sqlite3.Connection, batch_id: str) -> Batch | None:
    query = "SELECT fields FROM batch WHERE batch_id = ?"
    row = connection.execute(query, (batch_id,)).fetchone()
    return None if row is None else _DECODER.decode(row[0])


def _change(connection: sqlite3.Connection, batch_id: str, work: Callable[[Batch], Batch]) -> Batch:
    before = _find(connection, batch_id)
    assert before is not None, "only ended batches are removed"
    batch = work(before)
    connection.execute(
        "UPDATE batch SET is_open = ?, fields = ? WHERE batch_id = ?",
        (_openness(batch), _ENCODER.encode(batch), batch_id),
    )
    return batch


def _counted(batch: Batch, result: Result) -> Batch:
    return msgspec.structs.replace(
        batch,
        num_completed=batch.num_completed + (not result.is_error),
        num_failed=batch.num_failed + result.is_error,
        usage=batch.usage.plus(result.usage),
    )


def _reopened(batch: Batch, num_failed: int) -> Batch:
    if batch.state is not BatchState.IN_PROGRESS:
        raise IllegalTransition(f"lines of a batch that is {batch.state.value}")
    return msgspec.structs.replace(batch, num_failed=batch.num_failed - num_failed)


def _openness(batch: Batch) -> int:
    return 2 if batch.state is BatchState.SET_ASIDE else int(batch.state in OPEN)
