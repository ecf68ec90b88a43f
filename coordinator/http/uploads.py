"""A file that comes as multipart/form-data, streamed to the disk: in memory there is a megabyte.

1. The parser takes the body piece by piece; what belongs to the file is gathered.
2. Whenever there is a megabyte of it, a thread writes it, while there is room on the disk.
3. At the end the file is synced. Whoever asked moves it to where it belongs; what has not been
   moved when the block ends is removed, whatever has gone wrong.
"""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from coordinator.config import Limits
from coordinator.http.entry import SCOPE_IS_UPLOAD
from coordinator.jobs.engine.disk import check_space, told_when_full
from protocol.errors import RequestError

FILE_FIELD = "file"
WRITE_BYTES = 1 << 20
MAX_NAME_CHARS = 255
MAX_BOUNDARY_BYTES = 256


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that has arrived, and the fields that came with it, as text."""

    path: Path
    file_name: str
    size_bytes: int
    fields: dict[str, str]
    media_type: str = ""  # these two as the file's part declares them
    charset: str = ""


@asynccontextmanager
async def receive_upload(
    request: Request, folder: Path, limits: Limits, min_free_bytes: int
) -> AsyncIterator[Upload]:
    """Take in the body of a request; the file is there, and durable, while the block runs.

    Args:
        request: whose body has not been read.
        folder: on the disk where the file will stay.
        limits: of the fields; the body's size is the middleware's business.
        min_free_bytes: see ``check_space``.

    Raises:
        RequestError: it is not a form with one file, or there is no room for it.
        ClientDisconnect: its sender has gone, and can be told nothing.
    """
    form = _Form(_boundary(request), limits)
    path = folder / f"{secrets.token_hex(16)}.upload"
    declared = request.headers.get("content-length", "0")
    await asyncio.to_thread(check_space, folder, int(declared), min_free_bytes=min_free_bytes)
    try:
        with told_when_full(), path.open("xb") as file:
            size_bytes = 0
            async for piece in request.stream():
                form.feed(piece)
                if form.num_waiting >= WRITE_BYTES:
                    size_bytes += await asyncio.to_thread(_write, file, form.take())
                    await asyncio.to_thread(check_space, folder, 0, min_free_bytes=min_free_bytes)
            form.end()
            size_bytes += await asyncio.to_thread(_write, file, form.take())
            await asyncio.to_thread(_sync, file)
        yield Upload(path, form.file_name, size_bytes, form.fields, form.media_type, form.charset)
    finally:
        path.unlink(missing_ok=True)


def plain_file_name(name: str) -> str:
    """What is safe to show and to put into a header: no folders, nothing invisible."""
    last = name.replace("\\", "/").rpartition("/")[2]
    return "".join(c if c.isprintable() else "_" for c in last)[:MAX_NAME_CHARS] or "file"


class _Form:
    """A multipart form as it comes in. ``fields`` and ``file_name`` are whole after ``end``."""

    def __init__(self, boundary: bytes, limits: Limits) -> None:
        self.fields: dict[str, str] = {}
        self.file_name = ""
        self.media_type = self.charset = ""
        self.num_waiting = 0  # bytes of the file that have not been taken
        self._limits = limits
        self._waiting: list[bytes] = []
        self._header_name = b""
        self._header_value = b""
        self._disposition = self._content_type = b""
        self._field_name: str | None = None  # None: this part is the file
        self._value = bytearray()
        self._num_field_bytes = 0
        self._has_file = False
        self._is_ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    def feed(self, piece: bytes) -> None:
        """The next bytes of the body."""
        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise _malformed(str(error)) from error

    def take(self) -> list[bytes]:
        """What has arrived of the file since the last call."""
        waiting, self._waiting, self.num_waiting = self._waiting, [], 0
        return waiting

    def end(self) -> None:
        """The body is over: the form must be, too."""
        if not self._is_ended:
            raise _malformed("it ends in the middle")
        if not self._has_file:
            raise RequestError(
                "the form has no file", code="missing_required_parameter", param=FILE_FIELD
            )

    # -- called by the parser ----------------------------------------------------------------------

    def _on_part_begin(self) -> None:
        self._disposition = self._content_type = b""
        self._header_name = self._header_value = b""
        self._value.clear()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        elif self._header_name.lower() == b"content-type":
            self._content_type = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition)
        if kind != b"form-data" or b"name" not in options:
            raise _malformed("a part has no name")
        name = options[b"name"].decode("utf-8", "replace")
        if b"filename" not in options:
            self._begin_field(name)
        elif name != FILE_FIELD or self._has_file:
            raise RequestError(
                f"the form needs one file, named {FILE_FIELD!r}", code="invalid_value", param=name
            )
        else:
            self._has_file, self._field_name = True, None
            self.file_name = plain_file_name(options[b"filename"].decode("utf-8", "replace"))
            media_type, declared = parse_options_header(self._content_type)
            self.media_type = media_type.decode("ascii", "replace")[:64].lower()
            self.charset = declared.get(b"charset", b"").decode("ascii", "replace")[:64]

    def _begin_field(self, name: str) -> None:
        if name in self.fields:
            raise RequestError(
                f"the field {name[:64]!r} is given twice", code="duplicate_key", param=name[:64]
            )
        if len(self.fields) >= self._limits.max_upload_fields:
            raise RequestError("the form has too many fields", code="too_large")
        self._field_name = name

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field_name is None:
            self._waiting.append(data[start:end])
            self.num_waiting += end - start
            return
        self._num_field_bytes += end - start
        if self._num_field_bytes > self._limits.max_upload_field_bytes:
            raise RequestError("the form's fields are too long", code="too_large")
        self._value += data[start:end]

    def _on_part_end(self) -> None:
        if self._field_name is None:
            return
        try:
            self.fields[self._field_name] = self._value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(
                f"the field {self._field_name[:64]!r} is not UTF-8",
                code="invalid_encoding",
                param=self._field_name[:64],
            ) from error

    def _on_end(self) -> None:
        self._is_ended = True


def _boundary(request: Request) -> bytes:
    _, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if not request.scope.get(SCOPE_IS_UPLOAD) or not 0 < len(boundary) <= MAX_BOUNDARY_BYTES:
        raise _malformed("send multipart/form-data with a boundary")
    return boundary


def _malformed(why: str) -> RequestError:
    return RequestError(f"the body is not a usable form: {why[:200]}", code="invalid_multipart")


def _write(file: BinaryIO, pieces: list[bytes]) -> int:
    return file.write(b"".join(pieces))


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
