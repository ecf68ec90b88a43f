"""Temporary folders of a process: gone when it ends, and when it was killed, at the next start.

Such a folder has a file that its process keeps locked, under a name that nothing else uses: without
it, or while it is locked, a folder is left alone. The file gets the name when it is locked already,
so that a living process's folder is never found unlocked.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_NAME = ".baton-temporary"


@contextmanager
def temporary_folder(prefix: str, root: Path | None = None) -> Iterator[Path]:
    """A folder of mode 0700 that is gone afterwards; those of dead processes are removed first.

    Args:
        prefix: of its name, and of the names of those that are looked at.
        root: where it is made; None takes the system's place for such.

    Raises:
        OSError: it cannot be made, as on a full disk.
    """
    root = Path(tempfile.gettempdir()) if root is None else root
    remove_dead(prefix, root)
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
    lock = -1
    try:
        unnamed = path / f"{LOCK_NAME}.new"
        lock = os.open(unnamed, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(path / LOCK_NAME)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if lock >= 0:
            os.close(lock)


def remove_dead(prefix: str, root: Path) -> int:
    """Remove the folders of our processes that have ended without it; how many there were."""
    return sum(_remove_if_dead(path) for path in root.glob(f"{prefix}*"))


def _remove_if_dead(path: Path) -> bool:
    try:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return False
        lock = os.open(path / LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # none of these, or it is being removed
        return False
    with contextlib.closing(os.fdopen(lock)):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # its process lives
            return False
        shutil.rmtree(path, ignore_errors=True)
    return True
