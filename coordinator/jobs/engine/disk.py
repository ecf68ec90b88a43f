"""The disk of a data folder: what is refused when it is nearly full, and what still works then.

A full disk is nobody's end. Completions need none; jobs, documents and files are refused with 507,
but for deletions. Nothing can be deleted without writing down that it was, so some megabytes are
taken beforehand, the ballast: they are given up when the journal of what is deleted or ended finds
no room, and taken again as soon as there is plenty. ``/v1/cluster`` and the log tell of all that.
"""

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from protocol.errors import RequestError

MIN_FREE_SHARE = 0.05
MIN_FREE_BYTES = 512 << 20
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, a limit of the process
BALLAST_BYTES = 8 << 20
MAX_BALLAST_SHARE = 8  # of a small disk at most this part
LOOK_S = 2.0
SECRET_NAME = "secret"
OK, FULL = "ok", "full"

_log = logging.getLogger(__name__)


def insufficient_storage(reason: str) -> RequestError:
    """Nothing can be kept: nothing is accepted."""
    return RequestError(f"this cannot be stored: {reason}", code="insufficient_storage", status=507)


def check_space(folder: Path, needed_bytes: int, *, min_free_bytes: int = MIN_FREE_BYTES) -> None:
    """Refuse what would leave a disk fuller than it may be.

    Raises:
        RequestError: ``insufficient_storage``, with both numbers.
    """
    usage = shutil.disk_usage(folder)
    reserve = max(int(MIN_FREE_SHARE * usage.total), min_free_bytes)
    # On a large disk five percent is a lot; ten times the least is enough anywhere.
    reserve = min(reserve, 10 * min_free_bytes)
    if usage.free - needed_bytes < reserve:
        raise insufficient_storage(
            f"{usage.free} bytes are free, {needed_bytes} are needed and {reserve} are kept free"
        )


@contextmanager
def told_when_full() -> Iterator[None]:
    """What the operating system says of a full disk, said to the caller."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise insufficient_storage("the disk is full") from error
        raise


class Ballast:
    """A file that is kept for its room. Any thread may call it.

    Args:
        path: the file.
        size_bytes: on a disk that is not small.
    """

    def __init__(self, path: Path, size_bytes: int = BALLAST_BYTES) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._lock = threading.Lock()

    @property
    def is_there(self) -> bool:
        return self._path.exists()

    def release(self) -> bool:
        """Give up the room; False if it was given up already."""
        with self._lock:
            try:
                self._path.unlink()
            except OSError:
                return False
            return True

    def restore(self) -> bool:
        """Take the room, if twice as much is free; whether the file is there."""
        with self._lock:
            if self._path.exists():
                return True
            try:
                usage = shutil.disk_usage(self._path.parent)
                size_bytes = min(self._size_bytes, usage.total // MAX_BALLAST_SHARE)
                if usage.free < 2 * size_bytes:
                    return False
                self._fill(size_bytes)
            except OSError:  # somebody was faster
                return False
            return True

    def _fill(self, size_bytes: int) -> None:
        new = self._path.with_suffix(".new")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size_bytes)
            new.rename(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink()
            raise
        finally:
            os.close(descriptor)


class DiskWatch:
    """Looks at the disk of a data folder every few seconds.

    Args:
        folder: the data folder.
        secret: of it, which is written down if the launcher found no room for it; "" if there is
            none.
        min_free_bytes: see ``check_space``.
    """

    def __init__(self, folder: Path, secret: str, min_free_bytes: int) -> None:
        self.ballast = Ballast(folder / "ballast")
        self._folder = folder
        self._secret = secret
        self._min_free_bytes = min_free_bytes
        self.refusal: Callable[[], str] = str  # why the database is not open, if it is not
        self._state = OK
        self._reason = ""

    def describe(self) -> dict[str, Any]:
        """As ``/v1/cluster`` has it."""
        return {
            "state": self._state,
            "reason": self._reason or None,
            "free_bytes": shutil.disk_usage(self._folder).free,
            "has_ballast": self.ballast.is_there,
        }

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.to_thread(self.look)
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Take note of how full the disk is; keep the secret and the ballast, if there is room."""
        self.ballast.restore()
        if self._secret:
            with contextlib.suppress(OSError):
                keep_secret(self._folder / SECRET_NAME, self._secret)
        reason = self.refusal()
        try:
            check_space(self._folder, 0, min_free_bytes=self._min_free_bytes)
        except RequestError as error:
            reason = error.message
        state = FULL if reason else OK
        if state != self._state and state == FULL:
            _log.error("jobs, documents and files are refused: %s", reason)
        elif state != self._state:
            _log.warning("there is room on the disk again: jobs, documents and files are taken")
        self._state, self._reason = state, reason


def keep_secret(path: Path, secret: str) -> None:
    """Write the secret of a data folder, unless there is one. Durable when it returns.

    Raises:
        OSError: there is no room for it; nothing is left.
    """
    if path.exists():
        return
    part = path.with_suffix(".part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
