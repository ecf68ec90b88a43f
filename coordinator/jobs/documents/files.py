"""What of a document is too large for the database: its source, its text and its tokens.

    ID.source   the uploaded bytes, until they have been parsed
    ID.text     UTF-8; of a document that was given as text, or parsed
    ID.tokens   a header with count and digest, then 32-bit little-endian token ids

A file appears under its name when all of it is on the disk, and never changes; a name that no row
of the database has is left from a process that was killed, and removed at the next start.
"""

import contextlib
import hashlib
import os
import shutil
import struct
import sys
from array import array
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from coordinator.jobs.database import insufficient_storage
from coordinator.jobs.space import DISK_FULL, told_when_full
from protocol.crash_points import CrashPoints
from protocol.errors import RequestError
from protocol.failpoints import FILE_REMOVED, FILE_RENAMED, FILE_WRITE
from protocol.token_ids import TokenIds

SOURCE, TEXT, TOKENS = "source", "text", "tokens"
_MAGIC = b"BTK1"
_HEADER = struct.Struct("<4sQ16s")
_TYPECODE = "I"  # four bytes, wherever Python runs today


class DocumentFiles:
    """A folder of such files. Its methods block: call them in a thread.

    Args:
        folder: made if it is not there, readable for nobody else.
        crash_points: told of what becomes durable.
    """

    def __init__(self, folder: Path, crash_points: CrashPoints | None = None) -> None:
        self._crash_points = CrashPoints() if crash_points is None else crash_points
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, document_id: str, kind: str) -> Path:
        return self.folder / f"{document_id}.{kind}"

    def write(self, document_id: str, kind: str, data: bytes | memoryview) -> None:
        """Returns when the file is on the disk."""
        path = self.path(document_id, kind)
        new = path.with_name(f"{path.name}.new")
        with _counted_on(new):
            with new.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._name(new, path, kind)

    def adopt(self, document_id: str, path: Path) -> None:
        """Take over an uploaded file, which is on the same disk."""
        with told_when_full():
            _sync_file(path)
            self._name(path, self.path(document_id, SOURCE), SOURCE)

    def copy(self, document_id: str, path: Path) -> None:
        """Keep another's file: nothing that happens to it afterwards is seen here."""
        new = self.path(document_id, "source.new")
        with _counted_on(new):
            shutil.copyfile(path, new)
            self.adopt(document_id, new)

    def _name(self, new: Path, path: Path, kind: str) -> None:
        self._crash_points.reach(FILE_WRITE, kind)
        new.replace(path)
        self._crash_points.reach(FILE_RENAMED, kind)
        _sync_folder(self.folder)

    def has(self, document_id: str, kind: str) -> bool:
        return self.path(document_id, kind).exists()

    def read_text(self, document_id: str) -> str:
        """The document's text.

        Raises:
            RequestError: it is not there, or no text.
        """
        try:
            return self.path(document_id, TEXT).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise _damaged("text") from error

    def write_tokens(self, document_id: str, token_ids: Sequence[int]) -> None:
        data = TokenIds.of(token_ids).little()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        self.write(document_id, TOKENS, _HEADER.pack(_MAGIC, len(token_ids), digest) + data)

    def read_tokens(self, document_id: str) -> tuple[int, ...]:
        """The document's tokens.

        Raises:
            RequestError: they are not there, or not as they were written.
        """
        try:
            content = self.path(document_id, TOKENS).read_bytes()
            magic, count, digest = _HEADER.unpack_from(content)
        except (OSError, struct.error) as error:
            raise _damaged("tokens") from error
        data = content[_HEADER.size :]
        is_whole = magic == _MAGIC and len(data) == 4 * count
        if not is_whole or hashlib.blake2b(data, digest_size=16).digest() != digest:
            raise _damaged("tokens")
        token_ids = array(_TYPECODE, data)
        if sys.byteorder == "big":
            token_ids.byteswap()
        return tuple(token_ids)

    def remove(self, document_id: str, *kinds: str) -> None:
        """Remove some, or all, of a document's files. Idempotent."""
        for kind in kinds or (SOURCE, TEXT, TOKENS):
            with contextlib.suppress(FileNotFoundError):
                self.path(document_id, kind).unlink()
                self._crash_points.reach(FILE_REMOVED, kind)

    def sweep(self, known: Collection[str]) -> int:
        """Remove what belongs to no known document; how many files that were."""
        strangers = [p for p in self.folder.iterdir() if p.name.split(".")[0] not in known]
        unfinished = [p for p in self.folder.glob("*.new") if p not in strangers]
        for path in (*strangers, *unfinished):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        return len(strangers) + len(unfinished)


@contextlib.contextmanager
def _counted_on(new: Path) -> Iterator[None]:
    """``new`` has another name by the end, or is gone; a full disk is the request's failure."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise insufficient_storage("the disk is full") from error
        raise
    finally:
        new.unlink(missing_ok=True)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _damaged(what: str) -> RequestError:
    return RequestError(
        f"the {what} of this document cannot be read any more: ingest it again",
        code="document_damaged",
        status=500,
    )
