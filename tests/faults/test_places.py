"""What a place does when a failpoint says so, and what those who write then leave behind."""

import asyncio
import errno
import os
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from coordinator.config import BatchLimits, CoordinatorConfig, ExpectedPool
from coordinator.jobs.documents.document import Document
from coordinator.jobs.documents.document_tokens import DocumentTokens
from coordinator.jobs.documents.identity import ModelFacts
from coordinator.jobs.engine.database import Database
from coordinator.jobs.files.files import BATCH, Files, StoredFile
from coordinator.jobs.files.folder import DurableFolder
from coordinator.jobs.schema import prepare
from coordinator.text.tasks import Settings
from coordinator.text.tokenizing import TextIdentity
from kvcache.pool import KVPool
from kvcache.tiers.files import PackFiles
from modeling.checkpoint.config import load_config
from protocol.errors import RequestError
from protocol.kv import KVLayout
from protocol.process.crash_points import EXIT_FAILPOINT, CrashPoints
from protocol.process.failpoints import ACTIONS, FAIL, KINDS
from tests.coordinator.in_process import InProcessWorkers


def test_without_failpoints_a_place_does_nothing() -> None:
    crash_points = CrashPoints()
    assert not crash_points
    crash_points.reach("jobs.commit.before", "file_added")
    assert not crash_points.hits


def test_a_full_disk_a_delay_and_their_counts() -> None:
    hits: Counter[str] = Counter()
    crash_points = CrashPoints("jobs.file.write.text:fail@1,jobs.parse:delay=0.02", hits)
    crash_points.reach("jobs.file.write", "tokens")
    with pytest.raises(OSError, match=r"jobs\.file\.write") as caught:
        crash_points.reach("jobs.file.write", "text")
    assert caught.value.errno == errno.ENOSPC
    started = time.monotonic()
    crash_points.reach("jobs.parse")
    asyncio.run(crash_points.pass_by("jobs.parse"))
    assert time.monotonic() - started >= 0.04
    assert hits == {"failpoint:jobs.file.write.text:fail": 1, "failpoint:jobs.parse:delay": 2}


def test_a_place_ends_the_process_as_a_kill_does() -> None:
    script = (
        "import atexit\n"
        "from protocol.process.crash_points import CrashPoints; atexit.register(print, 'no')\n"
        "crash_points = CrashPoints('jobs.commit.after.line_answered:exit@2')\n"
        "crash_points.reach('jobs.commit.after', 'line_claimed')\n"
        "crash_points.reach('jobs.commit.after', 'line_answered'); print('once', flush=True)\n"
        "crash_points.reach('jobs.commit.after', 'line_answered'); print('twice')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (EXIT_FAILPOINT, b"once\n")
    assert done.stderr == b"failpoint jobs.commit.after.line_answered: exit\n"


def prepare_item(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE item (name TEXT)")


def test_a_full_disk_at_a_commit_changes_nothing() -> None:
    async def run() -> None:
        crash_points = CrashPoints("jobs.commit.before.file_added:fail@1")
        database = Database(None, prepare_item, crash_points)

        def add(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO item VALUES ('a')")

        with pytest.raises(RequestError) as caught:
            await database.write(add, "file_added")
        assert (caught.value.code, caught.value.status) == ("insufficient_storage", 507)
        count = "SELECT count(*) FROM item"
        assert await database.read(lambda c: c.execute(count).fetchone()) == (0,)
        await database.write(add, "file_added")
        assert await database.read(lambda c: c.execute(count).fetchone()) == (1,)
        database.close()

    asyncio.run(run())


@pytest.mark.parametrize("place", ["jobs.file.write.upload", "jobs.commit.before.file_added"])
def test_an_upload_that_a_full_disk_refuses_leaves_nothing(tmp_path: Path, place: str) -> None:
    async def run() -> None:
        crash_points = CrashPoints(f"{place}:fail")
        database = Database(None, prepare, crash_points)
        files = Files(database, tmp_path / "files", BatchLimits(), lambda: 1.0, crash_points)
        (arrived := tmp_path / "arrived").write_bytes(b"abc")
        with pytest.raises(RequestError) as caught:
            await files.add(StoredFile("file-a", "t", BATCH, "in", 3, 1), arrived)
        assert caught.value.code == "insufficient_storage"
        assert list(files.folder.path.iterdir()) == []
        database.close()

    asyncio.run(run())


def test_a_source_that_a_full_disk_refuses_is_told(tmp_path: Path) -> None:
    folder = DurableFolder(tmp_path / "documents", "", CrashPoints("jobs.file.write:fail"))
    (arrived := tmp_path / "arrived").write_bytes(b"abc")
    with pytest.raises(RequestError, match="disk is full"):
        folder.adopt(arrived, "doc_a.source")
    with pytest.raises(RequestError, match="disk is full"):
        folder.write("doc_a.text", b"abc")
    assert list(folder.path.iterdir()) == []


def test_who_stops_an_encoding_finds_it_ended(tmp_path: Path) -> None:
    """Else the tokens of a document that is deleted would be written when it is gone."""

    async def run() -> None:
        crash_points = CrashPoints("jobs.file.write.tokens:delay=0.2")
        files = DurableFolder(tmp_path, "", crash_points)
        files.write("doc_a.text", b"A text.")
        config = CoordinatorConfig("t", "arithmetic", (ExpectedPool("d", "decode", 1, 1),))
        workers = InProcessWorkers(Settings(config, load_config("arithmetic"), os.getpid()))
        facts = ModelFacts("arithmetic", "f", 4, "float32", TextIdentity("", ""))
        tokens = DocumentTokens(files, workers, facts)
        document = Document(
            id="doc_a", tenant="t", cache_salt="salt", created_at=0.0, kind="text", form="text"
        )
        encoding = asyncio.create_task(tokens.encode(document, 100))
        async with asyncio.timeout(20):
            while not crash_points.hits:  # noqa: ASYNC110 - a thread's doing
                await asyncio.sleep(0.001)
            encoding.cancel()
            await asyncio.wait({encoding})
        assert encoding.cancelled()
        assert (files / "doc_a.tokens").exists()

    asyncio.run(run())


@pytest.mark.parametrize("place", [name for name in ACTIONS if name.startswith("pack.")])
def test_a_pack_that_fails_leaves_no_trace(tmp_path: Path, place: str) -> None:
    if FAIL not in ACTIONS[place]:
        assert place == "pack.deleted"
        return
    pool = KVPool(KVLayout(3, 8, 2, 0, 1, 4, 8, "float32"))
    files = PackFiles(tmp_path, pool, "model", crash_points=CrashPoints(f"{place}:fail@1"))
    with pytest.raises(OSError, match=place):
        files.write(0, b"", (b"a" * 16,), [0])
    assert list(tmp_path.iterdir()) == []
    files.write(0, b"", (b"a" * 16,), [0])
    assert len(list(files.scan())) == 1


def test_kinds_are_of_places() -> None:
    assert KINDS.keys() <= ACTIONS.keys()
