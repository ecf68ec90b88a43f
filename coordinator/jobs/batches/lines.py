"""The lines of batches in the database, and their results.

Of a line that is done there is one result, keyed by (batch, line): a second answer, of a line that
was run again, is ignored, and is not counted. A result and the count of its batch are written in
one transaction.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import msgspec

from coordinator.jobs.batches.batch import DOCUMENTS, Batch, Claim, Line, Result
from coordinator.jobs.batches.states import BatchState
from coordinator.jobs.engine.database import Database
from coordinator.jobs.engine.engine import conflict
from coordinator.jobs.engine.table import Connection, JobTable

LINES_AT_ONCE = 5000  # other writers wait no longer than for so many
ROWS_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Written:
    """One row of a batch's files: a line and its result, if it has one."""

    number: int
    custom_id: str
    text: bytes | None
    is_error: bool


class LineTable:
    """The lines of all batches.

    Args:
        database: with the tables of schema.py.
        batches: whose lines they are.
    """

    def __init__(self, database: Database, batches: JobTable[Batch]) -> None:
        self._database = database
        self._batches = batches

    async def add(self, batch_id: str, lines: Sequence[Line]) -> None:
        """Keep the lines of a batch, instead of those of an earlier attempt at validating it."""
        await self.remove(batch_id)
        query = (
            "INSERT INTO line (batch_id, line, offset, size, custom_id, url, depends_on) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)"
        )
        for start in range(0, len(lines), LINES_AT_ONCE):
            some = lines[start : start + LINES_AT_ONCE]
            rows = [(batch_id, *msgspec.structs.astuple(line)) for line in some]
            await self._database.write(
                lambda c, rows=rows: c.executemany(query, rows),  # type: ignore[misc]
                "lines_added",
            )

    async def claim(
        self, batch_id: str, busy: Collection[int], *, takes_documents: bool
    ) -> Claim | None:
        """The first line that can be answered now, and is not ``busy``.

        Args:
            batch_id: which batch.
            busy: lines that are being answered.
            takes_documents: whether it may be one that makes a document.
        """
        query = (
            "SELECT l.line, l.offset, l.size, l.custom_id, l.url, l.depends_on, made.document_id "
            "FROM line l INDEXED BY line_left LEFT JOIN result made "
            "ON made.batch_id = l.batch_id AND made.line = l.depends_on "
            "WHERE l.batch_id = ? AND l.is_done = 0 AND (? OR l.url <> ?) "
            "AND (l.depends_on IS NULL OR made.line IS NOT NULL) "
            f"AND l.line NOT IN ({_marks(busy)}) ORDER BY l.line LIMIT 1"
        )
        values = (batch_id, takes_documents, DOCUMENTS, *busy)
        row = await self._database.read(lambda c: c.execute(query, values).fetchone())
        if row is None:
            return None
        *line, document_id = row
        return Claim(Line(*line), document_id)

    async def reopen(self, batch_id: str, numbers: Collection[int]) -> Batch:
        """Have lines answered again that have failed.

        Raises:
            RequestError: ``not_retryable``: the batch is not in progress any more.
        """

        def work(connection: Connection) -> Batch:
            batch = self._batches.found(connection, batch_id)
            if batch.state is not BatchState.IN_PROGRESS:
                raise conflict("not_retryable", batch, "its lines are not answered any more")
            failed = connection.execute(
                f"DELETE FROM result WHERE batch_id = ? AND line IN ({_marks(numbers)}) "
                f"AND is_error RETURNING line",
                (batch_id, *numbers),
            ).fetchall()
            connection.executemany(
                "UPDATE line SET is_done = 0 WHERE batch_id = ? AND line = ?",
                [(batch_id, number) for (number,) in failed],
            )
            num_failed = batch.num_failed - len(failed)
            after = msgspec.structs.replace(batch, num_failed=num_failed)
            return self._batches.keep(connection, batch, after)

        return await self._database.write(work, "batch_changed")

    async def record(self, batch_id: str, number: int, result: Result) -> None:
        """Keep the answer to a line, unless there is one, or the batch is ending."""

        def work(connection: Connection) -> None:
            batch = self._batches.found(connection, batch_id)
            if batch.state is not BatchState.IN_PROGRESS:
                return
            done = connection.execute(
                "UPDATE line SET is_done = 1 WHERE batch_id = ? AND line = ? AND is_done = 0",
                (batch_id, number),
            )
            if done.rowcount == 0:
                return  # it was run twice
            connection.execute(
                "INSERT OR IGNORE INTO result (batch_id, line, is_error, document_id, text) "
                "VALUES (?, ?, ?, ?, ?)",
                (batch_id, number, result.is_error, result.document_id, result.text),
            )
            after = msgspec.structs.replace(
                batch,
                num_completed=batch.num_completed + (not result.is_error),
                num_failed=batch.num_failed + result.is_error,
                usage=batch.usage.plus(result.usage),
            )
            self._batches.keep(connection, batch, after)

        await self._database.write(work, "line_answered")

    async def rows(self, batch_id: str, after: int) -> list[Written]:
        """Lines behind a number, in their order, with their results; empty at the end."""
        query = (
            "SELECT l.line, l.custom_id, r.text, coalesce(r.is_error, 0) FROM line l "
            "LEFT JOIN result r ON r.batch_id = l.batch_id AND r.line = l.line "
            "WHERE l.batch_id = ? AND l.line > ? ORDER BY l.line LIMIT ?"
        )
        values = (batch_id, after, ROWS_AT_ONCE)
        rows = await self._database.read(lambda c: c.execute(query, values).fetchall())
        return [Written(*row) for row in rows]

    async def remove(self, batch_id: str) -> None:
        """Remove lines and results of a batch whose files are written, or whose lines are new."""
        for table in ("result", "line"):
            query = (
                f"DELETE FROM {table} WHERE batch_id = :batch AND line IN "
                f"(SELECT line FROM {table} WHERE batch_id = :batch LIMIT :most)"
            )
            values = {"batch": batch_id, "most": ROWS_AT_ONCE}
            while await self._database.write(
                lambda c, query=query, values=values: c.execute(query, values).rowcount,  # type: ignore[misc]
                "lines_removed",
            ):
                pass


def _marks(values: Collection[int]) -> str:
    return ",".join("?" * len(values))
