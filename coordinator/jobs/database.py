"""What must survive a crash, in SQLite: written by one thread, durable before it is acknowledged.

A full disk ends nothing: what cannot be opened now is opened later, and what is to be deleted, or
has ended, may use the room of the ballast. What is new may not.

WAL with ``synchronous = FULL``: a transaction that ``write`` has returned from is on disk, whatever
dies afterwards (https://sqlite.org/pragma.html#pragma_synchronous). The connection belongs to one
thread, which takes writes and reads in the order of their asking.
"""

import asyncio
import contextlib
import errno
import logging
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from coordinator.jobs.ballast import Ballast
from protocol.crash_points import CrashPoints
from protocol.errors import ConfigError, RequestError
from protocol.failpoints import COMMIT_AFTER, COMMIT_BEFORE

T = TypeVar("T")
_log = logging.getLogger(__name__)
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
_NEW = frozenset({"document_added", "file_added", "batch_added", "lines_added", "line_answered"})


class Database:
    """One database, for one event loop.

    Args:
        path: its file; None keeps it in memory.
        schema: statements that make what is not there yet.
        crash_points: told of every commit.
        ballast: given up for what must be written on a full disk.

    Raises:
        ConfigError: the file cannot be opened, or is not ours.
    """

    def __init__(
        self,
        path: Path | None,
        schema: Sequence[str],
        crash_points: CrashPoints | None = None,
        ballast: Ballast | None = None,
    ) -> None:
        self._path = path
        self._schema = schema
        self._crash_points = CrashPoints() if crash_points is None else crash_points
        self._ballast = ballast
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._opened: sqlite3.Connection | None = None
        try:
            self._thread.submit(self._connect).result()
        except RequestError as error:  # it is tried again whenever it is asked for
            _log.error("%s", error)
        except sqlite3.Error as error:
            self._thread.shutdown()
            raise ConfigError(f"--data-dir: {path}: {error}") from error

    async def write(self, work: Callable[[sqlite3.Connection], T], kind: str = "") -> T:
        """One transaction: all of ``work`` or nothing of it.

        Args:
            work: makes the changes.
            kind: of change, one of ``protocol.failpoints.CHANGES``.

        Raises:
            RequestError: the disk is full (507); what ``work`` raises.
        """
        return await self._run(lambda change: self._transaction(change, kind), work)

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """``work`` on what has been committed."""
        return await self._run(lambda reader: reader(self._connect()), work)

    def refusal(self) -> str:
        """Why it cannot be used now; empty if it can."""
        return "" if self._opened is not None else "the disk is full"

    def close(self) -> None:
        """Idempotent; waits for what is being written."""
        with contextlib.suppress(RuntimeError):  # it was closed before
            self._thread.submit(self._disconnect).result()
        self._thread.shutdown()

    async def _run(
        self,
        how: Callable[[Callable[[sqlite3.Connection], T]], T],
        work: Callable[[sqlite3.Connection], T],
    ) -> T:
        loop = asyncio.get_running_loop()
        # A cancelled caller must not leave a transaction half done: the thread ends it.
        return await asyncio.shield(loop.run_in_executor(self._thread, how, work))

    # -- in the thread -----------------------------------------------------------------------------

    def _connect(self) -> sqlite3.Connection:
        if self._opened is None:
            self._opened = self._with_room(lambda: _open(self._path, self._schema), is_new=False)
        return self._opened

    def _disconnect(self) -> None:
        if self._opened is not None:
            self._opened.close()

    def _with_room(self, attempt: Callable[[], T], *, is_new: bool) -> T:
        """Once more without the ballast, if the disk was full."""
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

    def _transaction(self, work: Callable[[sqlite3.Connection], T], kind: str) -> T:
        return self._with_room(lambda: self._attempt(work, kind), is_new=kind in _NEW)

    def _attempt(self, work: Callable[[sqlite3.Connection], T], kind: str) -> T:
        connection = self._connect()
        try:
            connection.execute("BEGIN IMMEDIATE")
            result = work(connection)
            self._crash_points.reach(COMMIT_BEFORE, kind)
            connection.execute("COMMIT")
        except BaseException as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # a failpoint's
                raise insufficient_storage("the disk is full") from error
            raise
        self._crash_points.reach(COMMIT_AFTER, kind)
        return result


def insufficient_storage(reason: str) -> RequestError:
    """Nothing can be kept: nothing is accepted."""
    return RequestError(f"this cannot be stored: {reason}", code="insufficient_storage", status=507)


def _is_full(error: sqlite3.OperationalError) -> bool:
    return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _FULL


def _open(path: Path | None, schema: Sequence[str]) -> sqlite3.Connection:
    name = ":memory:" if path is None else str(path)
    connection = sqlite3.connect(name, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA busy_timeout = 5000")
        for statement in schema:
            connection.execute(statement)
    except BaseException:
        connection.close()
        raise
    return connection
