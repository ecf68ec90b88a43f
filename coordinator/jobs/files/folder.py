"""A folder of files that are whole or not there, whatever dies.

A file gets its name when all of it is on the disk, and never changes. Up to the first dot the name
is that of a row in the database. A file that no row knows is left from a process that was killed,
and is removed at the next start.
"""

import asyncio
import contextlib
import os
import shutil
from collections.abc import Collection, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

from coordinator.jobs.engine.disk import told_when_full
from protocol.process.crash_points import CrashPoints
from protocol.process.failpoints import FILE_REMOVED, FILE_RENAMED, FILE_WRITE

T = TypeVar("T")
UNFINISHED = ".new"


async def finished(work: Coroutine[Any, Any, T]) -> T:
    """Do ``work`` to its end, also when its caller is cancelled: no thread stops then, and it must
    not write a file of a document that is deleted next; nor may a row go without its file."""
    running = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        running.exception()
        raise


class DurableFolder:
    """One folder, for such files alone. Its methods block: call them in a thread.

    Methods that write raise ``RequestError`` if the disk is full, and leave nothing then.

    Args:
        path: made if it is not there, readable for nobody else.
        kind: of the files, for failpoints; of one with a dot in its name it is what follows.
        crash_points: told of what becomes durable.
    """

    def __init__(self, path: Path, kind: str, crash_points: CrashPoints | None = None) -> None:
        self.path = path
        self.crash_points = CrashPoints() if crash_points is None else crash_points
        self._kind = kind
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._found = {found.name for found in path.iterdir()}

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def new(self, name: str) -> Path:
        """Where a file is written before it has its name."""
        return self / f"{name}{UNFINISHED}"

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Returns when the file is on the disk."""
        with self._writing(name) as new:
            new.write_bytes(data)

    def copy(self, source: Path, name: str) -> None:
        """Keep another's file: nothing that happens to it afterwards is seen here."""
        with self._writing(name) as new:
            shutil.copyfile(source, new)

    def adopt(self, arrived: Path, name: str, kind: str = "") -> None:
        """Take over a file that lies on the same disk; it is gone if that fails."""
        kind = kind or self._kind_of(name)
        try:
            with told_when_full():
                with arrived.open("rb") as file:
                    os.fsync(file.fileno())
                self.crash_points.reach(FILE_WRITE, kind)
                arrived.replace(self / name)
        except BaseException:
            arrived.unlink(missing_ok=True)
            raise
        self.crash_points.reach(FILE_RENAMED, kind)
        self._sync()

    def link(self, source: Path, name: str) -> None:
        """Keep a file of the same disk, whose deletion then takes nothing from here."""
        os.link(source, self / name)
        self.crash_points.reach(FILE_RENAMED, self._kind_of(name))
        self._sync()

    def remove(self, *names: str) -> None:
        """Idempotent."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                (self / name).unlink()
                self.crash_points.reach(FILE_REMOVED, self._kind_of(name))

    def sweep(self, known: Collection[str]) -> None:
        """Remove what an earlier process has left, but for the files of known rows.

        What has come since the start is left: its row may be about to be written.
        """
        for name in self._found:
            if name.endswith(UNFINISHED) or name.split(".")[0] not in known:
                self.remove(name)
        self._found.clear()

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        new = self.new(name)
        try:
            with told_when_full():
                yield new
            self.adopt(new, name)
        finally:
            new.unlink(missing_ok=True)

    def _kind_of(self, name: str) -> str:
        return name.partition(".")[2] or self._kind

    def _sync(self) -> None:
        """Make names durable that have come or gone."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
