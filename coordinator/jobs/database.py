"""What must survive a crash, in SQLite: written by one thread, durable before it is acknowledged.

WAL with ``synchronous = FULL``: a transaction that ``write`` has returned from is on disk, whatever
dies afterwards (https://sqlite.org/pragma.html#pragma_synchronous). The connection belongs to one
thread, which takes writes and reads in the order of their asking.
"""

import asyncio
import contextlib
import errno
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from protocol.errors import ConfigError, RequestError
from protocol.failpoints import COMMIT_AFTER, COMMIT_BEFORE
from protocol.places import Places

T = TypeVar("T")
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


class Database:
    """One database, for one event loop.

    Args:
        path: its file; None keeps it in memory.
        schema: statements that make what is not there yet.
        places: told of every commit.

    Raises:
        ConfigError: the file cannot be opened, or is not ours.
    """

    def __init__(
        self, path: Path | None, schema: Sequence[str], places: Places | None = None
    ) -> None:
        self._places = Places() if places is None else places
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        try:
            self._connection = self._thread.submit(_open, path, schema).result()
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
        return await self._run(lambda reader: reader(self._connection), work)

    def close(self) -> None:
        """Idempotent; waits for what is being written."""
        with contextlib.suppress(RuntimeError):  # it was closed before
            self._thread.submit(self._connection.close).result()
        self._thread.shutdown()

    async def _run(
        self,
        how: Callable[[Callable[[sqlite3.Connection], T]], T],
        work: Callable[[sqlite3.Connection], T],
    ) -> T:
        loop = asyncio.get_running_loop()
        # A cancelled caller must not leave a transaction half done: the thread ends it.
        return await asyncio.shield(loop.run_in_executor(self._thread, how, work))

    def _transaction(self, work: Callable[[sqlite3.Connection], T], kind: str) -> T:
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            result = work(connection)
            self._places.reach(COMMIT_BEFORE, kind)
            connection.execute("COMMIT")
        except BaseException as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if _is_full(error):
                raise insufficient_storage("the disk is full") from error
            raise
        self._places.reach(COMMIT_AFTER, kind)
        return result


def insufficient_storage(reason: str) -> RequestError:
    """Nothing can be kept: nothing is accepted."""
    return RequestError(f"this cannot be stored: {reason}", code="insufficient_storage", status=507)


def _is_full(error: BaseException) -> bool:
    if isinstance(error, sqlite3.OperationalError):
        return (error.sqlite_errorcode & 0xFF) in _FULL or errno.ENOSPC in error.args
    return isinstance(error, OSError) and error.errno == errno.ENOSPC  # a failpoint's


def _open(path: Path | None, schema: Sequence[str]) -> sqlite3.Connection:
    name = ":memory:" if path is None else str(path)
    connection = sqlite3.connect(name, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA busy_timeout = 5000")
    for statement in schema:
        connection.execute(statement)
    return connection
