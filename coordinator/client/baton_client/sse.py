"""Server-sent events, read as the bytes come in. Pure: a parser holds an unfinished line and event.

Lines end in LF, CRLF or CR; a blank one ends an event; one that begins with a colon is a comment.
What has no blank line behind it is not an event: a stream that breaks off leaves nothing half.
"""

import msgspec

from baton_client.errors import BatonConnectionError

MAX_BUFFERED_BYTES = 64 << 20
DONE = b"[DONE]"
"""The data of the last event of a stream that has ended well."""
_BOM = b"\xef\xbb\xbf"


class ServerEvent(msgspec.Struct, frozen=True, gc=False):
    """One event; ``data`` is JSON, or ``DONE``."""

    data: bytes
    event: str = "message"


class Comment(msgspec.Struct, frozen=True, gc=False):
    """Says nothing to most readers; Baton's tell of progress."""

    text: str


class EventParser:
    """Feed it bytes, cut anywhere; it gives the events and comments that have become whole."""

    def __init__(self, max_bytes: int = MAX_BUFFERED_BYTES) -> None:
        self._max_bytes = max_bytes
        self._rest = b""  # of the last line
        self._is_first = True
        self._has_cr = False  # a line has ended with CR: an LF that follows belongs to it
        self._data: list[bytes] = []
        self._event = ""
        self._num_bytes = 0  # of the unfinished event

    def feed(self, data: bytes) -> list[ServerEvent | Comment]:
        """
        Raises:
            BatonConnectionError: an event without an end.
        """
        if not data:
            return []
        if self._has_cr:
            data = data.removeprefix(b"\n")
        if self._rest:
            data = self._rest + data
        lines = data.splitlines()
        self._has_cr = data.endswith(b"\r")
        is_whole = self._has_cr or data.endswith(b"\n")
        self._rest = lines.pop() if lines and not is_whole else b""
        if lines and self._is_first:
            self._is_first, lines[0] = False, lines[0].removeprefix(_BOM)
        found = [item for line in lines if (item := self._take(line)) is not None]
        if len(self._rest) + self._num_bytes > self._max_bytes:
            raise BatonConnectionError(f"an event of more than {self._max_bytes} bytes")
        return found

    def _take(self, line: bytes) -> ServerEvent | Comment | None:
        if not line:
            data, event = self._data, self._event
            self._data, self._event, self._num_bytes = [], "", 0
            return ServerEvent(b"\n".join(data), event or "message") if data else None
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not name:
            return Comment(value.decode("utf-8", "replace"))
        self._num_bytes += len(line)
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value.decode("utf-8", "replace")
        return None
