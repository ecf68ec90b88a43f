"""The database of the jobs, and the room that is asked for before anything is accepted."""

import asyncio
import shutil
import sqlite3
from pathlib import Path

import pytest

from coordinator.jobs.engine.database import Database, Superseded
from coordinator.jobs.engine.disk import Ballast, check_space
from protocol.errors import ConfigError, RequestError


def prepare(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE IF NOT EXISTS item (name TEXT PRIMARY KEY, value BLOB)")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS part (item TEXT REFERENCES item(name) ON DELETE CASCADE)"
    )


def names(connection: sqlite3.Connection) -> list[str]:
    return [name for (name,) in connection.execute("SELECT name FROM item ORDER BY name")]


async def write(database: Database, name: str, size: int = 1) -> None:
    await database.write(
        lambda connection: connection.execute(
            "INSERT INTO item VALUES (?, zeroblob(?))", (name, size)
        )
    )


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    async def run() -> None:
        first = Database(tmp_path / "jobs.sqlite", prepare)
        await write(first, "a")
        first.close()
        first.close()
        second = Database(tmp_path / "jobs.sqlite", prepare)
        assert await second.read(names) == ["a"]
        second.close()

    asyncio.run(run())


def test_it_is_durable_and_checks_its_references(tmp_path: Path) -> None:
    async def pragma(database: Database, name: str) -> object:
        return await database.read(lambda c: c.execute(f"PRAGMA {name}").fetchone()[0])

    async def run() -> None:
        database = Database(tmp_path / "jobs.sqlite", prepare)
        assert await pragma(database, "journal_mode") == "wal"
        assert await pragma(database, "synchronous") == 2
        with pytest.raises(sqlite3.IntegrityError):
            await database.write(lambda c: c.execute("INSERT INTO part VALUES ('nobody')"))
        database.close()

    asyncio.run(run())


def test_a_transaction_is_whole_or_nothing() -> None:
    async def run() -> None:
        database = Database(None, prepare)

        def half(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO item VALUES ('half', x'')")
            raise RequestError("no", code="no")

        with pytest.raises(RequestError):
            await database.write(half)
        assert await database.read(names) == []
        await write(database, "next")
        assert await database.read(names) == ["next"]
        database.close()

    asyncio.run(run())


def test_writes_are_one_after_another() -> None:
    async def run() -> None:
        database = Database(None, prepare)
        await asyncio.gather(*(write(database, f"{n:03}") for n in range(100)))
        assert await database.read(names) == [f"{n:03}" for n in range(100)]
        database.close()

    asyncio.run(run())


def test_a_write_whose_asker_is_gone_is_ended_all_the_same() -> None:
    async def run() -> None:
        database = Database(None, prepare)
        asked = asyncio.create_task(write(database, "a"))
        await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert await database.read(names) == ["a"]
        database.close()

    asyncio.run(run())


def test_only_the_process_that_came_last_writes(tmp_path: Path) -> None:
    async def run() -> None:
        old, new = (Database(tmp_path / "jobs.sqlite", prepare) for _ in range(2))
        with pytest.raises(Superseded):
            await write(old, "old")
        await write(new, "new")
        assert await old.read(names) == ["new"]
        old.close()
        new.close()

    asyncio.run(run())


def test_a_full_disk_is_507_and_what_was_there_stays(tmp_path: Path) -> None:
    async def run() -> None:
        database = Database(tmp_path / "jobs.sqlite", prepare)
        await write(database, "before")
        await database.read(lambda c: c.execute("PRAGMA max_page_count = 10").fetchone())
        with pytest.raises(RequestError) as refused:
            await write(database, "large", 1 << 20)
        assert (refused.value.status, refused.value.code) == (507, "insufficient_storage")
        assert await database.read(names) == ["before"]
        await write(database, "small")
        database.close()

    asyncio.run(run())


def test_a_file_that_is_no_database_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").write_bytes(b"not a database, but long enough to be looked at" * 99)
    with pytest.raises(ConfigError, match="not a database"):
        Database(tmp_path / "jobs.sqlite", prepare)


def test_room_is_kept_free(tmp_path: Path) -> None:
    check_space(tmp_path, 0, min_free_bytes=1)
    with pytest.raises(RequestError) as refused:
        check_space(tmp_path, 1 << 60)
    assert (refused.value.status, refused.value.code) == (507, "insufficient_storage")


class Room:
    """A ballast whose release lets a database grow by some pages."""

    def __init__(self) -> None:
        self.is_there = True
        self.connection: sqlite3.Connection | None = None

    def release(self) -> bool:
        assert self.connection is not None
        self.connection.execute("PRAGMA max_page_count = 1000")
        was_there, self.is_there = self.is_there, False
        return was_there


def test_the_ballast_is_for_what_ends_and_not_for_what_is_new(tmp_path: Path) -> None:
    async def run() -> None:
        room = Room()
        database = Database(tmp_path / "jobs.sqlite", prepare, ballast=room)  # type: ignore[arg-type]

        def fill(connection: sqlite3.Connection) -> None:
            room.connection = connection
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            connection.execute(f"PRAGMA max_page_count = {pages}")

        def grow(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO item VALUES ('a', zeroblob(100000))")

        await database.read(fill)
        for kind in ("document_added", "file_added", "batch_added", "lines_added"):
            with pytest.raises(RequestError) as full:
                await database.write(grow, kind)
            assert full.value.status == 507
        assert room.is_there
        await database.write(grow, "document_deleted")
        assert not room.is_there
        assert await database.read(names) == ["a"]
        await database.read(fill)
        with pytest.raises(RequestError):
            await database.write(lambda c: c.execute("UPDATE item SET value = zeroblob(9000000)"))
        database.close()

    asyncio.run(run())


def test_a_ballast_is_taken_when_there_is_room_and_given_up_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ballast = Ballast(tmp_path / "ballast", 4096)
    assert not ballast.release()
    assert ballast.restore() and ballast.restore()
    found = (tmp_path / "ballast").stat()
    assert (found.st_size, found.st_mode & 0o777) == (4096, 0o600)
    assert found.st_blocks * 512 >= 4096, "the room is really taken"
    assert ballast.release() and not ballast.release()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=8191))
    assert not ballast.restore()
    assert not list(tmp_path.iterdir())
    small = usage._replace(total=8 * 1024, free=2048)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: small)
    assert ballast.restore()
    assert (tmp_path / "ballast").stat().st_size == 1024
