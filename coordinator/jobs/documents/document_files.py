"""What of a document is too large for the database: its source, its text and its tokens.

ID.source   the uploaded bytes, until they have been parsed
ID.text     UTF-8; of a document that was given as text, or parsed
ID.tokens   a header with count and digest, then 32-bit little-endian token ids
"""

import hashlib
import struct
import sys
from array import array
from collections.abc import Collection, Sequence
from pathlib import Path

from coordinator.jobs.files.folder import DurableFolder
from protocol.crash_points import CrashPoints
from protocol.errors import RequestError
from protocol.token_ids import TokenIds

SOURCE, TEXT, TOKENS = "source", "text", "tokens"
_MAGIC = b"BTK1"
_HEADER = struct.Struct("<4sQ16s")
_TYPECODE = "I"  # four bytes, wherever Python runs today


class DocumentFiles:
    """A folder of such files. Its methods block: call them in a thread.

    Args:
        path: of the folder.
        crash_points: told of what becomes durable.
    """

    def __init__(self, path: Path, crash_points: CrashPoints | None = None) -> None:
        self.folder = DurableFolder(path, crash_points)

    def path(self, document_id: str, kind: str) -> Path:
        return self.folder.path / f"{document_id}.{kind}"

    def has(self, document_id: str, kind: str) -> bool:
        return self.path(document_id, kind).exists()

    def write(self, document_id: str, kind: str, data: bytes | memoryview) -> None:
        """Returns when the file is on the disk."""
        self.folder.write(f"{document_id}.{kind}", data, kind)

    def write_tokens(self, document_id: str, token_ids: Sequence[int]) -> None:
        data = TokenIds.of(token_ids).little()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        self.write(document_id, TOKENS, _HEADER.pack(_MAGIC, len(token_ids), digest) + data)

    def take_source(self, document_id: str, path: Path, *, is_ours: bool) -> None:
        """Take over an uploaded file of the same disk, or copy one that stays another's."""
        take = self.folder.adopt if is_ours else self.folder.copy
        take(path, f"{document_id}.{SOURCE}", SOURCE)

    def remove(self, document_id: str, *kinds: str) -> None:
        """Remove some, or all, of a document's files. Idempotent."""
        for kind in kinds or (SOURCE, TEXT, TOKENS):
            self.folder.remove(f"{document_id}.{kind}", kind)

    def recover(self, known: Collection[str]) -> int:
        """Remove what was left of unknown documents; how many files that were."""
        return self.folder.sweep(known, SOURCE)


def read_text(folder: Path, document_id: str) -> str:
    """A document's text.

    Raises:
        RequestError: it is not there, or no text.
    """
    try:
        return (folder / f"{document_id}.{TEXT}").read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged("text") from error


def read_tokens(folder: Path, document_id: str) -> tuple[int, ...]:
    """A document's tokens.

    Raises:
        RequestError: they are not there, or not as they were written.
    """
    try:
        content = (folder / f"{document_id}.{TOKENS}").read_bytes()
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


def _damaged(what: str) -> RequestError:
    return RequestError(
        f"the {what} of this document cannot be read any more: ingest it again",
        code="document_damaged",
        status=500,
    )
