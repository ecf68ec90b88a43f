"""What of a document is too large for the database: its source, its text and its tokens.

ID.source   the uploaded bytes, until they have been parsed
ID.text     UTF-8; of a document that was given as text, or parsed
ID.tokens   a header with count and digest, then 32-bit little-endian token ids
"""

import hashlib
import struct
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path

from protocol.errors import RequestError
from protocol.token_ids import TokenIds

_MAGIC = b"BTK1"
_HEADER = struct.Struct("<4sQ16s")
_TYPECODE = "I"  # four bytes, wherever Python runs today


def file_names(document_id: str) -> tuple[str, str, str]:
    """Of the source, the text and the tokens."""
    return f"{document_id}.source", f"{document_id}.text", f"{document_id}.tokens"


def packed_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as they lie in their file."""
    data = TokenIds.of(token_ids).little()
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return _HEADER.pack(_MAGIC, len(token_ids), digest) + data


def read_text(folder: Path, document_id: str) -> str:
    """A document's text.

    Raises:
        RequestError: it is not there, or no text.
    """
    try:
        return (folder / f"{document_id}.text").read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged("text") from error


def read_tokens(folder: Path, document_id: str) -> tuple[int, ...]:
    """A document's tokens.

    Raises:
        RequestError: they are not there, or not as they were written.
    """
    try:
        content = (folder / f"{document_id}.tokens").read_bytes()
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
