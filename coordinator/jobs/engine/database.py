"""What must survive a crash, in SQLite: written by one thread, durable before it is acknowledged.

WAL with ``synchronous = FULL``: a transaction that ``write`` has returned from is on disk, whatever
dies afterwards (https://sqlite.org/pragma.html#pragma_synchronous). The connection belongs to one
thread, which takes writes and reads in the order in which they are asked for.

One process at a time owns a database: the one that has opened it last. An older one that still runs
can write nothing any more.

A full disk ends nothing: what cannot be opened now is opened later, and what deletes or ends may
use the room of the ballast. What is new may not.
"""

import asyncio
import contextlib
import errno
import logging
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from coordinator.jobs.engine.disk import Ballast, insufficient_storage
from protocol.errors import BatonError, ConfigError, RequestError
from protocol.process.crash_points import CrashPoints
from protocol.process.failpoints import COMMIT_AFTER, COMMIT_BEFORE

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]
_log = logging.getLogger(__name__)
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
_NEW = frozenset({"document_added", "file_added", "batch_added", "lines_added", "line_answered"})


class Superseded(BatonError):
    """Another process works with this database now: this one must not write to it any more."""


class Database:
    """One database, for one event loop.

    Args:
        path: its file; None keeps it in memory.
        prepare: makes the tables that are not there yet, inside of a transaction.
        crash_points: told of every commit.
        ballast: given up for what must be written on a full disk.

    Raises:
        ConfigError: the file cannot be opened, or is not ours.
    """

    def __init__(
        self,
        path: Path | None,
        prepare: Callable[[sqlite3.Connection], None],
        crash_points: CrashPoints | None = None,
        ballast: Ballast | None = None,
    ) -> None:
        self._path = path
        self._prepare = prepare
        self._crash_points = CrashPoints() if crash_points is None else crash_points
        self._ballast = ballast
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._opened: sqlite3.Connection | None = None
        self._owner = 0  # the number of this process among those that have opened it
        try:
            self._thread.submit(self._connect).result()
        except RequestError as error:  # it is tried again whenever it is asked for
            _log.error("%s", error)
        except (sqlite3.Error, ConfigError) as error:
            self._thread.shutdown()
            raise ConfigError(f"--data-dir: {path}: {error}") from error

    async def write(self, work: Work[T], name: str = "") -> T:
        """Run one transaction: all of ``work`` or nothing of it.

        Args:
            work: makes the changes.
            name: of the change, one of ``protocol.process.failpoints.CHANGES``.

        Raises:
            RequestError: the disk is full (507); what ``work`` raises.
            Superseded: see there.
        """
        return await self._run(
            lambda: self._with_room(
                lambda: self._transact(self._connect(), self._owned(work), name),
                is_new=name in _NEW,
            )
        )

    async def read(self, work: Work[T]) -> T:
        """Run ``work`` on what has been committed."""
        return await self._run(lambda: work(self._connect()))

    def refusal(self) -> str:
        """Why it cannot be used now; empty if it can."""
        return "" if self._opened is not None else "the disk is full"

    def close(self) -> None:
        """Close it when everything is written. Idempotent."""
        with contextlib.suppress(RuntimeError):  # it was closed before
            self._thread.submit(self._disconnect).result()
        self._thread.shutdown()

    async def _run(self, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        # A cancelled caller must not leave a transaction half done: the thread ends it.
        return await asyncio.shield(loop.run_in_executor(self._thread, work))

    # -- in the thread -----------------------------------------------------------------------------

    def _connect(self) -> sqlite3.Connection:
        if self._opened is None:
            self._opened = self._with_room(self._open, is_new=False)
        return self._opened

    def _open(self) -> sqlite3.Connection:
        name = ":memory:" if self._path is None else str(self._path)
        connection = sqlite3.connect(name, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA busy_timeout = 5000")
            self._owner = self._transact(connection, self._claim, "owner_claimed")
            connection.execute("PRAGMA foreign_keys = ON")  # only now: tables may be converted
        except BaseException:
            connection.close()
            raise
        return connection

    def _claim(self, connection: sqlite3.Connection) -> int:
        self._prepare(connection)
        connection.execute(
            "CREATE TABLE IF NOT EXISTS owner (number INTEGER PRIMARY KEY AUTOINCREMENT)"
        )
        number = connection.execute("INSERT INTO owner DEFAULT VALUES").lastrowid
        connection.execute("DELETE FROM owner WHERE number < ?", (number,))
        return number or 0

    def _owned(self, work: Work[T]) -> Work[T]:
        def owned(connection: sqlite3.Connection) -> T:
            (newest,) = connection.execute("SELECT MAX(number) FROM owner").fetchone()
            if newest != self._owner:
                raise Superseded(f"process {newest} works with this database, not {self._owner}")
            return work(connection)

        return owned

    def _disconnect(self) -> None:
        if self._opened is not None:
            self._opened.close()

    def _with_room(self, attempt: Callable[[], T], *, is_new: bool) -> T:
        """Try once more without the ballast, if the disk was full."""
        try:
            return attempt()
        except sqlite3.OperationalError as error:
            if not _is_full(error):
                raise
            if is_new or self._ballast is None or not self._ballast.release():
                raise insufficient_storage("the disk is full") from error
        try:
            return attempt()
        except sqlite3.OperationalError as error:
            if _is_full(error):
                raise insufficient_storage("the disk is full") from error
            raise

    def _transact(self, connection: sqlite3.Connection, work: Work[T], name: str) -> T:
        try:
            connection.execute("BEGIN IMMEDIATE")
            result = work(connection)
            self._crash_points.reach(COMMIT_BEFORE, name)
            connection.execute("COMMIT")
        except BaseException as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # a failpoint's
                raise insufficient_storage("the disk is full") from error
            raise
        self._crash_points.reach(COMMIT_AFTER, name)
        return result


def _is_full(error: sqlite3.OperationalError) -> bool:
    return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _FULL
