"""Server-sent events, read as the bytes come in. Pure: a parser holds an unfinished line and event.

Lines end in LF, CRLF or CR; a blank one ends an event; one that begins with a colon is a comment.
What has no blank line behind it is not an event: a stream that breaks off leaves nothing half.
"""

import re
from dataclasses import dataclass

from coordinator.client.errors import BatonConnectionError

MAX_BUFFERED_BYTES = 64 << 20
_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event."""

    data: str
    event: str = "message"
    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class Comment:
    """Says nothing to most readers; ours tells of progress."""

    text: str


class EventParser:
    """Feed it bytes, cut anywhere; it gives the events and comments that have become whole."""

    def __init__(self, max_bytes: int = MAX_BUFFERED_BYTES) -> None:
        self._max_bytes = max_bytes
        self._rest = b""
        self._is_first = True
        self._data: list[str] = []
        self._event = ""
        self._event_id: str | None = None
        self._num_bytes = 0  # of the unfinished event

    def feed(self, data: bytes) -> list[ServerEvent | Comment]:
        """
        Raises:
            BatonConnectionError: an event without an end.
        """
        found: list[ServerEvent | Comment] = []
        for line in self._lines(data):
            item = self._take(line)
            if item is not None:
                found.append(item)
        if len(self._rest) + self._num_bytes > self._max_bytes:
            raise BatonConnectionError(f"an event of more than {self._max_bytes} bytes")
        return found

    def _lines(self, data: bytes) -> list[bytes]:
        if b"\n" not in data and b"\r" not in data and not self._rest.endswith(b"\r"):
            self._rest += data
            return []
        whole = self._rest + data
        held = b""
        if whole.endswith(b"\r"):  # perhaps the first half of CRLF
            whole, held = whole[:-1], b"\r"
        *lines, rest = _LINE_END.split(whole)
        self._rest = rest + held
        if lines and self._is_first:
            self._is_first = False
            lines[0] = lines[0].removeprefix(_BOM)
        return lines

    def _take(self, line: bytes) -> ServerEvent | Comment | None:
        if not line:
            return self._dispatch()
        text = line.decode("utf-8", "replace")
        name, _, value = text.partition(":")
        value = value.removeprefix(" ")
        if not name:
            return Comment(value)
        self._num_bytes += len(line)
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._event_id = value
        return None

    def _dispatch(self) -> ServerEvent | None:
        data, event = self._data, self._event
        self._data, self._event, self._num_bytes = [], "", 0
        return ServerEvent("\n".join(data), event or "message", self._event_id) if data else None
