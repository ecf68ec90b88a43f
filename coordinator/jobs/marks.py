"""What this process has in work, in a file that outlives it.

A mark is one write of a few bytes into the page cache before the work begins: ``kill -9`` leaves it
there, and a power failure, which is nobody's fault, may lose it. So marks cost no sync. Each life
of the coordinator has a file of its own: an older process that still ends writes to nobody else's.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from coordinator.jobs.suspects import Work

T = TypeVar("T")
SLOT_BYTES = 256
_SUFFIX = ".marks"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_EMPTY = b" " * (SLOT_BYTES - 1) + b"\n"


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
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._boot = boot
        self._path = folder / f"{secrets.token_hex(16)}{_SUFFIX}"
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        self._file = os.open(self._path, flags, 0o600)
        self._free: list[int] = []
        self._num_slots = 1  # the first says which boot it is
        self._write(0, msgspec.json.encode(boot))

    def put(self, work: Work) -> int:
        """Mark work that is about to begin; the mark's number."""
        slot = self._free.pop() if self._free else self._num_slots
        self._num_slots = max(self._num_slots, slot + 1)
        self._write(slot, msgspec.json.encode(work))
        return slot

    def take(self, slot: int) -> None:
        """The work has ended, and this process has not."""
        self._write(slot, b"")
        self._free.append(slot)

    def earlier(self) -> Iterator[Life]:
        """Lives that have ended, with what they had in work: each until it is forgotten."""
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            if path != self._path:
                yield Life(path.stem, self._read(path))

    def forget(self, life: Life) -> None:
        """Idempotent."""
        (self._folder / f"{life.name}{_SUFFIX}").unlink(missing_ok=True)

    def close(self) -> None:
        """An orderly end: nothing was in work. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._path.unlink(missing_ok=True)

    def _write(self, slot: int, content: bytes) -> None:
        assert len(content) < SLOT_BYTES, "names are short"
        # A full disk keeps nobody from working: such a death is not counted.
        with contextlib.suppress(OSError):
            os.pwrite(self._file, content + _EMPTY[len(content) :], slot * SLOT_BYTES)

    def _read(self, path: Path) -> tuple[Work, ...]:
        try:
            content = path.read_bytes()
        except OSError:
            return ()
        slots = [content[at : at + SLOT_BYTES] for at in range(0, len(content), SLOT_BYTES)]
        if not slots or _decoded(slots[0], str) != self._boot:
            return ()
        works = (_decoded(slot, Work) for slot in slots[1:])
        return tuple(work for work in works if work is not None)


def _decoded(slot: bytes, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(slot, type=kind)
    except msgspec.DecodeError:  # free, or the file's end
        return None
