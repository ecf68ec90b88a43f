"""The input of a batch: a link to the uploaded file, read line by line.

1. ``Batches.create`` links the file, so that its deletion takes nothing from the batch.
2. ``LineReader``, in a text worker, checks every line and notes where it is; nothing of its body is
   kept.
3. ``request_of``, too, reads one line again, when its turn has come.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from coordinator.config import BatchLimits, Limits
from coordinator.errors import invalid_value
from coordinator.jobs.batches.batch import DOCUMENTS, Line, LineEdit, LineError
from coordinator.validation.bodies import Body
from coordinator.validation.json_body import parse_json
from protocol.errors import RequestError

CUSTOM = "custom:"  # a document_id that begins so names a line of the same batch
MAX_CUSTOM_ID_CHARS = 512


@contextmanager
def opened(path: Path, line: Line | None = None, edit: LineEdit | None = None) -> Iterator[Body]:
    """All lines of an input, for :class:`LineReader`; or one of them, for :func:`request_of`."""
    with path.open("rb") as file:
        number = file.fileno()
        if line is None:
            yield Body(file=number, length=os.fstat(number).st_size)
        else:
            yield Body(file=number, offset=line.offset, length=line.size, line=edit)


def request_of(data: bytes, edit: LineEdit, limits: Limits) -> dict[str, Any]:
    """The request of a line, with what is put into it now.

    Raises:
        RequestError: as ``parse_json``.
    """
    body: dict[str, Any] = parse_json(data, limits)["body"]
    for holder in _references(body):
        holder["document_id"] = edit.document_id
    if edit.idempotency_key is not None:
        body.setdefault("idempotency_key", edit.idempotency_key)
    return body


class LineReader:
    """Reads one input. ``errors`` has the first of them."""

    def __init__(self, endpoint: str, limits: BatchLimits, json_limits: Limits) -> None:
        self.lines: list[Line] = []
        self.errors: list[LineError] = []
        self._urls = {endpoint, DOCUMENTS}
        self._limits = limits
        self._json_limits = json_limits
        self._by_custom_id: dict[str, Line] = {}

    def read(self, file: BinaryIO) -> None:
        offset = 0
        most = self._json_limits.max_body_bytes
        for number, data in enumerate(iter(lambda: file.readline(most + 1), b""), 1):
            if len(data) > most:
                return self._refuse("line_too_long", f"longer than {most} bytes", number)
            if len(self.lines) >= self._limits.max_lines and data.strip():
                return self._refuse("too_many_lines", f"more than {self._limits.max_lines}", number)
            try:
                if data.strip():
                    self._take(self._line(number, offset, data))
            except RequestError as error:
                self._refuse(error.code, error.message, number, error.param)
            if len(self.errors) >= self._limits.max_errors:
                return None
            offset += len(data)
        if not self.lines and not self.errors:
            self._refuse("empty_file", "the file has no lines")
        return None

    def _take(self, line: Line) -> None:
        self._by_custom_id[line.custom_id] = line
        self.lines.append(line)

    def _line(self, number: int, offset: int, data: bytes) -> Line:
        fields = parse_json(data, self._json_limits)
        custom_id, url = fields.get("custom_id"), fields.get("url")
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS:
            raise invalid_value(
                "custom_id", f"custom_id must be a text of 1 to {MAX_CUSTOM_ID_CHARS} characters"
            )
        if custom_id in self._by_custom_id:
            raise RequestError(
                f"custom_id {custom_id[:64]!r} is that of an earlier line, too",
                code="duplicate_custom_id",
                param="custom_id",
            )
        if fields.get("method") != "POST":
            raise invalid_value("method", "method must be POST")
        if not isinstance(url, str) or url not in self._urls:
            raise invalid_value("url", f"url must be the batch's endpoint, or {DOCUMENTS}")
        body = fields.get("body")
        if not isinstance(body, dict):
            raise invalid_value("body", "body must be an object")
        if body.get("stream"):
            raise invalid_value("stream", "stream cannot be true in a batch")
        depends_on = self._dependency(body)
        return Line(number, offset, len(data), custom_id, url, depends_on)

    def _dependency(self, body: dict[str, Any]) -> int | None:
        named = {holder["document_id"].removeprefix(CUSTOM) for holder in _references(body)}
        if not named:
            return None
        made_by = self._by_custom_id.get(named.pop())
        if named or made_by is None or made_by.url != DOCUMENTS:
            raise invalid_value(
                "document_id",
                f"document_id names a line of this batch: one earlier, to {DOCUMENTS}",
            )
        return made_by.number

    def _refuse(
        self, code: str, message: str, number: int | None = None, param: str | None = None
    ) -> None:
        self.errors.append(LineError(code, message, number, param))


def _references(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Objects of a request whose ``document_id`` names a line of the batch."""
    candidates: list[Any] = [body]
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        candidates += content if isinstance(content, list) else []
    for candidate in candidates:
        given = candidate.get("document_id") if isinstance(candidate, dict) else None
        if isinstance(given, str) and given.startswith(CUSTOM):
            yield candidate
