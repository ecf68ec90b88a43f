"""What this process has in work, as names of files that outlive it.

A mark is an empty file, made before the work begins: ``kill -9`` leaves it in the page cache, and a
power failure, which is nobody's fault, may lose it. So marks cost no sync. Each life of the
coordinator has a folder of its own, whose name begins with the boot of the running kernel.
"""

import contextlib
import itertools
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from coordinator.jobs.engine.suspects import Work

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Life(msgspec.Struct, frozen=True):
    """A process that has ended without taking its marks off."""

    name: str
    on_board: tuple[Work, ...]


def boot_id() -> str:
    """Of the running kernel; "" where there is none."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


class Marks:
    """The marks of this life.

    Args:
        folder: of all lives' marks; made if it is not there.
        boot: of the running kernel: what a life of another boot had in work is not to blame.
    """

    def __init__(self, folder: Path, boot: str) -> None:
        self._lives = folder
        self._boot = f"{boot}."
        self._folder = folder / f"{self._boot}{secrets.token_hex(16)}"
        self._folder.mkdir(parents=True, mode=0o700)
        self._numbers = itertools.count()

    def put(self, work: Work) -> Path:
        """Mark work that is about to begin; the mark."""
        mark = self._folder / f"{next(self._numbers)} {work.kind} {work.key} {work.position}"
        with contextlib.suppress(OSError):  # a full disk keeps nobody from working
            mark.touch()
        return mark

    def take(self, mark: Path) -> None:
        """The work has ended, and this process has not."""
        with contextlib.suppress(OSError):
            mark.unlink()

    def earlier(self) -> Iterator[Life]:
        """Lives that have ended, with what they had in work: each until it is forgotten."""
        for folder in sorted(self._lives.iterdir()):
            if folder.is_file():
                folder.unlink()  # of an older version
            elif folder != self._folder:
                is_of_boot = folder.name.startswith(self._boot)
                marks = sorted(mark.name for mark in folder.iterdir()) if is_of_boot else []
                yield Life(folder.name, tuple(map(_work, marks)))

    def forget(self, life: Life) -> None:
        """Idempotent."""
        shutil.rmtree(self._lives / life.name, ignore_errors=True)

    def close(self) -> None:
        """An orderly end: nothing was in work. Idempotent."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _work(mark: str) -> Work:
    _, kind, key, position = mark.split(" ")
    return Work(kind, key, int(position))
