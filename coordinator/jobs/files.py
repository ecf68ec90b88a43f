"""Files of callers, and those that batches leave: bytes in a folder, rows in SQLite.

1. ``add`` moves a file that has arrived into the folder, syncs it, then writes the row: what has
   been acknowledged has both.
2. ``delete`` takes the row away, then the file.
3. A file without a row is what a crash left in between: ``recover`` removes it.
"""

import asyncio
import os
import secrets
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from coordinator.config import BatchLimits
from coordinator.jobs.database import Database
from coordinator.jobs.space import told_when_full
from protocol.crash_points import CrashPoints
from protocol.errors import RequestError
from protocol.failpoints import FILE_REMOVED, FILE_RENAMED, FILE_WRITE

ID_PREFIX = "file-"
BATCH, BATCH_OUTPUT = "batch", "batch_output"
SCHEMA = (
    """CREATE TABLE IF NOT EXISTS file (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        file_id TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL,
        purpose TEXT NOT NULL,
        file_name TEXT NOT NULL,
        size_bytes INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        expires_at INTEGER
    )""",
    """CREATE TABLE IF NOT EXISTS file_type (
        file_id TEXT PRIMARY KEY REFERENCES file (file_id) ON DELETE CASCADE,
        media_type TEXT NOT NULL,
        charset TEXT NOT NULL
    )""",
    "CREATE INDEX IF NOT EXISTS file_of_tenant ON file (tenant, sequence)",
    "CREATE INDEX IF NOT EXISTS file_expiry ON file (expires_at) WHERE expires_at IS NOT NULL",
)
CheckQuota = Callable[[sqlite3.Connection, str, int], None]
_COLUMNS = "file_id, tenant, purpose, file_name, size_bytes, created_at, expires_at"
_TYPE_COLUMNS = "coalesce(media_type, ''), coalesce(charset, '')"
_SELECT = f"SELECT {_COLUMNS}, {_TYPE_COLUMNS} FROM file LEFT JOIN file_type USING (file_id)"


class StoredFile(msgspec.Struct, frozen=True):
    """A file, but for its bytes. Times are Unix seconds."""

    file_id: str
    tenant: str
    purpose: str
    file_name: str
    size_bytes: int
    created_at: int
    expires_at: int | None = None
    media_type: str = ""  # these two as they were declared with it
    charset: str = ""


@dataclass(frozen=True, slots=True)
class FilePage:
    """Which files of a tenant to list."""

    after: str | None = None
    limit: int = 10_000
    is_ascending: bool = False
    purpose: str | None = None


class Files:
    """All files.

    Args:
        database: made with ``SCHEMA``.
        folder: for their bytes alone; made if it is not there.
        limits: how many there may be.
        clock: Unix time.
        crash_points: told of what becomes durable.
        check_quota: whether a tenant may keep so many bytes more; raises if not.
    """

    def __init__(
        self,
        database: Database,
        folder: Path,
        limits: BatchLimits,
        clock: Callable[[], float],
        crash_points: CrashPoints | None = None,
        check_quota: CheckQuota = lambda _connection, _tenant, _num_bytes: None,
    ) -> None:
        self._check_quota = check_quota
        self.crash_points = CrashPoints() if crash_points is None else crash_points
        self.folder = folder
        self.limits = limits
        self.clock = clock
        self._database = database
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._found = {path.name for path in folder.iterdir()}

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file that is known are."""
        return self.folder / file_id

    async def add(self, file: StoredFile, arrived: Path) -> StoredFile:
        """Take over ``arrived``, which is synced and on the same disk. Returns when it is durable.

        Raises:
            RequestError: the tenant has too many files, or bytes, or the disk is full.
        """
        path = self.path(file.file_id)
        with told_when_full():
            await asyncio.to_thread(self.move_durably, arrived, path, "upload")

        def work(connection: sqlite3.Connection) -> None:
            query = "SELECT count(*) FROM file WHERE tenant = ?"
            (count,) = connection.execute(query, (file.tenant,)).fetchone()
            if count >= self.limits.max_files:
                raise RequestError(
                    f"{count} files are kept already: delete some",
                    code="too_many_files",
                    status=429,
                )
            self._check_quota(connection, file.tenant, file.size_bytes)
            insert_file(connection, file)

        try:
            await self._database.write(work, "file_added")
        except RequestError:
            await asyncio.to_thread(path.unlink)
            raise
        return file

    async def get(self, tenant: str, file_id: str, param: str | None = None) -> StoredFile:
        """A file of the tenant's.

        Raises:
            RequestError: there is none (404).
        """

        def work(connection: sqlite3.Connection) -> StoredFile | None:
            query = f"{_SELECT} WHERE file_id = ? AND tenant = ?"
            row = connection.execute(query, (file_id, tenant)).fetchone()
            return None if row is None else StoredFile(*row)

        file = await self._database.read(work)
        if file is None or self._is_expired(file):
            raise RequestError("no such file", code="file_not_found", param=param, status=404)
        return file

    async def page(self, tenant: str, page: FilePage) -> tuple[list[StoredFile], bool]:
        """Files of the tenant's, and whether there are more.

        Raises:
            RequestError: the file to go on after is not there.
        """
        order, compares = ("ASC", ">") if page.is_ascending else ("DESC", "<")
        conditions = ["tenant = :tenant", "coalesce(expires_at, :now + 1) > :now"]
        if page.purpose is not None:
            conditions.append("purpose = :purpose")
        if page.after is not None:
            of_after = "SELECT sequence FROM file WHERE file_id = :after AND tenant = :tenant"
            conditions.append(f"sequence {compares} ({of_after})")
            await self.get(tenant, page.after, "after")
        where = " AND ".join(conditions)
        query = f"{_SELECT} WHERE {where} ORDER BY sequence {order} LIMIT :limit"
        values = {
            "tenant": tenant,
            "now": int(self.clock()),
            "purpose": page.purpose,
            "after": page.after,
            "limit": page.limit + 1,
        }
        rows = await self._database.read(lambda c: c.execute(query, values).fetchall())
        return [StoredFile(*row) for row in rows[: page.limit]], len(rows) > page.limit

    async def delete(self, tenant: str, file_id: str) -> None:
        """Forget a file. A batch that was made of it goes on: it has a link of its own.

        Raises:
            RequestError: there is none (404).
        """
        await self.get(tenant, file_id)
        await self._database.write(
            lambda c: c.execute("DELETE FROM file WHERE file_id = ?", (file_id,)), "file_deleted"
        )
        await asyncio.to_thread(self._remove, file_id)

    async def recover(self) -> None:
        """Remove what an earlier process has left and no row tells of. Before batches go on."""
        rows = await self._database.read(lambda c: c.execute("SELECT file_id FROM file").fetchall())
        # Only what was there before anything could be uploaded: a new file is moved, then written.
        for name in self._found.difference(file_id for (file_id,) in rows):
            await asyncio.to_thread(self._remove, name)
        self._found.clear()

    async def remove_expired(self) -> None:
        """Forget the files whose time is over."""
        now = int(self.clock())

        def work(connection: sqlite3.Connection) -> list[str]:
            query = "DELETE FROM file WHERE expires_at <= ? RETURNING file_id"
            return [file_id for (file_id,) in connection.execute(query, (now,)).fetchall()]

        for file_id in await self._database.write(work, "files_expired"):
            await asyncio.to_thread(self._remove, file_id)

    def move_durably(self, source: Path, target: Path, kind: str) -> None:
        """Give a synced file its name, so that it has it after a crash, too. Blocks."""
        self.crash_points.reach(FILE_WRITE, kind)
        source.replace(target)
        self.crash_points.reach(FILE_RENAMED, kind)
        sync_folder(target.parent)

    def _remove(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)
        self.crash_points.reach(FILE_REMOVED, "upload")

    def _is_expired(self, file: StoredFile) -> bool:
        return file.expires_at is not None and file.expires_at <= self.clock()


def new_file_id() -> str:
    """An id that nobody guesses."""
    return f"{ID_PREFIX}{secrets.token_hex(16)}"


def insert_file(connection: sqlite3.Connection, file: StoredFile) -> None:
    """Write the row, inside of a transaction."""
    *columns, media_type, charset = msgspec.structs.astuple(file)
    connection.execute(f"INSERT INTO file ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", columns)
    if media_type or charset:
        declared = (file.file_id, media_type, charset)
        connection.execute("INSERT INTO file_type VALUES (?, ?, ?)", declared)


def sync_folder(folder: Path) -> None:
    """Make names durable that have come or gone. Blocks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
