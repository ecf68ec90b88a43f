"""The folder of ``--data-dir``: the files that a cluster leaves for the next one.

lock               held by the launcher that runs a cluster on it
secret             salts the hashes of every tenant's blocks; without it no KV is found again
kv/                packs of KV, written by the store
ballast            room for deletions on a full disk
jobs.sqlite        documents, files and batches, written by the coordinator
documents/ files/  what they consist of
"""

import contextlib
import errno
import fcntl
import logging
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from coordinator.jobs.engine.disk import SECRET_NAME, keep_secret
from protocol.errors import ConfigError

log = logging.getLogger(__name__)

FOLDERS = ("kv", "documents", "files", "batches")
_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class DataFolder:
    """An opened folder, which no other cluster can open while ``lock`` is open."""

    folder: Path
    secret: str
    lock: IO[str]

    @property
    def kv(self) -> Path:
        return self.folder / "kv"


def open_data_folder(name: str) -> DataFolder:
    """Make the folder if it is not there, and lock it for this process.

    Raises:
        ConfigError: it cannot be written, or another cluster runs on it.
    """
    folder = Path(name).expanduser().resolve()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--data-dir {name}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise ConfigError(
            f"--data-dir {name}: another cluster runs on it, choose another folder"
        ) from error
    try:
        _close_to_others(folder)
        return DataFolder(folder, _secret(folder / SECRET_NAME), lock)
    except OSError as error:
        lock.close()
        raise ConfigError(f"--data-dir {name}: {error.strerror}") from error


def _close_to_others(folder: Path) -> None:
    """Make the content private: older versions have left some of it readable for others."""
    for name in FOLDERS:
        with contextlib.suppress(FileNotFoundError):
            (folder / name).chmod(0o700)
    for path in folder.glob("jobs.sqlite*"):
        path.chmod(0o600)


def _secret(path: Path) -> str:
    """The folder's secret; the first cluster draws it."""
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    drawn = secrets.token_hex(_SECRET_BYTES)
    try:
        keep_secret(path, drawn)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        log.warning("%s: the disk is full; the coordinator writes it when there is room", path)
    return drawn
