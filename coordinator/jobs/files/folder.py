"""A folder of files that are whole or not there, whatever dies.

A file gets its name when all of it is on the disk, and never changes. Up to the first dot the name
is that of a row in the database. A file that no row knows is left from a process that was killed,
and is removed at the next start.
"""

import contextlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from coordinator.jobs.engine.disk import told_when_full
from protocol.crash_points import CrashPoints
from protocol.failpoints import FILE_REMOVED, FILE_RENAMED, FILE_WRITE

UNFINISHED = ".new"


class DurableFolder:
    """One folder, for such files alone. Its methods block: call them in a thread.

    ``kind`` is one of ``protocol.failpoints.KINDS``. Methods that write raise ``RequestError`` if
    the disk is full, and leave nothing then.

    Args:
        path: made if it is not there, readable for nobody else.
        crash_points: told of what becomes durable.
    """

    def __init__(self, path: Path, crash_points: CrashPoints | None = None) -> None:
        self.path = path
        self.crash_points = CrashPoints() if crash_points is None else crash_points
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._found = {found.name for found in path.iterdir()}

    def new(self, name: str) -> Path:
        """Where a file is written before it has its name."""
        return self.path / f"{name}{UNFINISHED}"

    def write(self, name: str, data: bytes | memoryview, kind: str) -> None:
        """Returns when the file is on the disk."""
        new = self.new(name)
        try:
            with told_when_full():
                new.write_bytes(data)
                self.adopt(new, name, kind)
        finally:
            new.unlink(missing_ok=True)

    def copy(self, source: Path, name: str, kind: str) -> None:
        """Keep another's file: nothing that happens to it afterwards is seen here."""
        new = self.new(name)
        try:
            with told_when_full():
                shutil.copyfile(source, new)
                self.adopt(new, name, kind)
        finally:
            new.unlink(missing_ok=True)

    def adopt(self, arrived: Path, name: str, kind: str) -> None:
        """Take over a file that lies on the same disk."""
        try:
            with told_when_full():
                with arrived.open("rb") as file:
                    os.fsync(file.fileno())
                self.crash_points.reach(FILE_WRITE, kind)
                arrived.replace(self.path / name)
        except BaseException:
            arrived.unlink(missing_ok=True)
            raise
        self.crash_points.reach(FILE_RENAMED, kind)
        self._sync()

    def link(self, source: Path, name: str, kind: str) -> None:
        """Keep a file of the same disk, whose deletion then takes nothing from here."""
        os.link(source, self.path / name)
        self.crash_points.reach(FILE_RENAMED, kind)
        self._sync()

    def remove(self, name: str, kind: str) -> None:
        """Idempotent."""
        with contextlib.suppress(FileNotFoundError):
            (self.path / name).unlink()
            self.crash_points.reach(FILE_REMOVED, kind)

    def sweep(self, known: Collection[str], kind: str) -> int:
        """Remove what an earlier process has left, but for the files of known rows.

        What has come since the start is left: its row may be about to be written.

        Returns:
            How many files that were.
        """
        strangers = [
            name
            for name in self._found
            if name.endswith(UNFINISHED) or name.split(".")[0] not in known
        ]
        for name in strangers:
            self.remove(name, kind)
        self._found.clear()
        return len(strangers)

    def _sync(self) -> None:
        """Make names durable that have come or gone."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
