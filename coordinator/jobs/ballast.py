"""Room that is kept for the day on which the disk is full: a file that can be given up.

Nothing can be deleted without writing down that it was. So some megabytes of the disk are taken
beforehand, and given back when the journal of what is deleted or ended finds no room; they are
taken again as soon as there is plenty.
"""

import contextlib
import os
import shutil
import threading
from pathlib import Path

SIZE_BYTES = 8 << 20
MAX_SHARE = 8  # of a small disk at most this part


class Ballast:
    """One file. Any thread may call it.

    Args:
        path: the file.
        size_bytes: on a disk that is not small.
    """

    def __init__(self, path: Path, size_bytes: int = SIZE_BYTES) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._lock = threading.Lock()

    @property
    def is_there(self) -> bool:
        return self._path.exists()

    def release(self) -> bool:
        """Give it up; False if it was gone already."""
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
                size_bytes = min(self._size_bytes, usage.total // MAX_SHARE)
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
