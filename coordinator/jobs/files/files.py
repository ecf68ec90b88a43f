"""Files of callers, and those that batches leave: bytes in a folder, rows in SQLite.

1. ``add`` moves a file that has arrived into the folder, then writes the row: what has been
   acknowledged has both.
2. ``delete`` takes the row away, then the file.
3. A file without a row is what a crash left in between: ``recover`` removes it.
"""

import asyncio
import secrets
import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec

from coordinator.config import BatchLimits
from coordinator.jobs.engine.database import Database
from coordinator.jobs.files.folder import DurableFolder, finished
from coordinator.jobs.files.quotas import NO_QUOTA, Quota
from protocol.errors import RequestError
from protocol.process.crash_points import CrashPoints

BATCH, BATCH_OUTPUT = "batch", "batch_output"


class StoredFile(msgspec.Struct, frozen=True):
    """A file, but for its bytes; the columns of its row. Times are Unix seconds."""

    file_id: str
    tenant: str
    purpose: str
    file_name: str
    size_bytes: int
    created_at: int
    expires_at: int | None = None
    media_type: str = ""  # these two as they were declared with it
    charset: str = ""


_COLUMNS = ", ".join(StoredFile.__struct_fields__)


class Files:
    """All files.

    Args:
        database: with the tables of schema.py.
        folder: for their bytes alone; made if it is not there.
        limits: how many there may be.
        clock: Unix time.
        crash_points: told of what becomes durable.
        quota: of a tenant's bytes.
    """

    def __init__(
        self,
        database: Database,
        folder: Path,
        limits: BatchLimits,
        clock: Callable[[], float],
        crash_points: CrashPoints | None = None,
        quota: Quota = NO_QUOTA,
    ) -> None:
        self.folder = DurableFolder(folder, "upload", crash_points)
        self.limits = limits
        self.clock = clock
        self._database = database
        self._quota = quota

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file that is known are."""
        return self.folder / file_id

    async def add(self, file: StoredFile, arrived: Path) -> StoredFile:
        """Take over ``arrived``, which is on the same disk. Returns when it is durable.

        Raises:
            RequestError: the tenant has too many files, or bytes, or the disk is full.
        """
        await asyncio.to_thread(self.folder.adopt, arrived, file.file_id)

        def work(connection: sqlite3.Connection) -> None:
            query = "SELECT count(*) FROM file WHERE tenant = ?"
            (count,) = connection.execute(query, (file.tenant,)).fetchone()
            if count >= self.limits.max_files:
                raise RequestError(
                    f"{count} files are kept already: delete some",
                    code="too_many_files",
                    status=429,
                )
            self._quota.check(connection, file.tenant, file.size_bytes)
            insert_file(connection, file)

        try:
            await self._database.write(work, "file_added")
        except RequestError:
            await asyncio.to_thread(self.path(file.file_id).unlink)
            raise
        return file

    async def get(self, tenant: str, file_id: str, param: str | None = None) -> StoredFile:
        """A file of the tenant's.

        Raises:
            RequestError: there is none (404).
        """
        found = await self._select("file_id = ? AND tenant = ?", file_id, tenant)
        now = self.clock()
        if not found or (found[0].expires_at is not None and found[0].expires_at <= now):
            raise RequestError("no such file", code="file_not_found", param=param, status=404)
        return found[0]

    async def page(
        self,
        tenant: str,
        after: str | None,
        limit: int,
        *,
        is_ascending: bool,
        purpose: str | None = None,
    ) -> tuple[list[StoredFile], bool]:
        """Files of the tenant's in the order of their coming, and whether there are more.

        Raises:
            RequestError: the file to go on after is not there.
        """
        where = "tenant = ? AND coalesce(expires_at > ?, TRUE)"
        values: list[object] = [tenant, int(self.clock())]
        if purpose is not None:
            where, values = f"{where} AND purpose = ?", [*values, purpose]
        order, compares = ("ASC", ">") if is_ascending else ("DESC", "<")
        if after is not None:
            await self.get(tenant, after, "after")
            where += f" AND sequence {compares} (SELECT sequence FROM file WHERE file_id = ?)"
            values.append(after)
        where += f" ORDER BY sequence {order} LIMIT {limit + 1}"
        found = await self._select(where, *values)
        return found[:limit], len(found) > limit

    async def delete(self, tenant: str, file_id: str) -> None:
        """Forget a file. A batch that was made of it goes on: it has a link of its own.

        Raises:
            RequestError: there is none (404).
        """
        await self.get(tenant, file_id)
        await finished(self._drop("file_id = ?", file_id, "file_deleted"))

    async def recover(self) -> None:
        """Remove what an earlier process has left and no row tells of. Before batches go on."""
        rows = await self._database.read(lambda c: c.execute("SELECT file_id FROM file").fetchall())
        known = {file_id for (file_id,) in rows}
        await asyncio.to_thread(self.folder.sweep, known)

    async def remove_expired(self) -> None:
        """Forget the files whose time is over."""
        await finished(self._drop("expires_at <= ?", int(self.clock()), "files_expired"))

    async def _drop(self, where: str, value: object, name: str) -> None:
        query = f"DELETE FROM file WHERE {where} RETURNING file_id"
        rows = await self._database.write(lambda c: c.execute(query, (value,)).fetchall(), name)
        await asyncio.to_thread(self.folder.remove, *(file_id for (file_id,) in rows))

    async def _select(self, where: str, *values: object) -> list[StoredFile]:
        query = f"SELECT {_COLUMNS} FROM file WHERE {where}"
        rows = await self._database.read(lambda c: c.execute(query, values).fetchall())
        return [StoredFile(*row) for row in rows]


def new_file_id() -> str:
    """An id that nobody guesses."""
    return f"file-{secrets.token_hex(16)}"


def insert_file(connection: sqlite3.Connection, file: StoredFile) -> None:
    """Write the row, inside of a transaction."""
    values = msgspec.structs.astuple(file)
    marks = ", ".join("?" * len(values))
    connection.execute(f"INSERT INTO file ({_COLUMNS}) VALUES ({marks})", values)
