"""Server-sent events, read as the bytes come in. Pure: a parser holds an unfinished line and event.

Lines end in LF, CRLF or CR; a blank one ends an event; one that begins with a colon is a comment.
What has no blank line behind it is not an event: a stream that breaks off leaves nothing half.
"""

import msgspec

from baton_client.errors import BatonConnectionError

MAX_BUFFERED_BYTES = 64 << 20
DONE = b"[DONE]"
"""The data of the last event of a stream that has ended well."""
MESSAGE = "message"
"""What an event is that does not say what it is."""
_BOM = b"\xef\xbb\xbf"


class ServerEvent(msgspec.Struct, frozen=True, gc=False):
    """One event; ``data`` is JSON, or ``DONE``."""

    data: bytes
    event: str = MESSAGE


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
        self._data: list[bytes] = []  # of the unfinished event
        self._event = MESSAGE

    def feed(self, data: bytes) -> list[ServerEvent | Comment]:
        """
        Raises:
            BatonConnectionError: an event without an end.
        """
        found: list[ServerEvent | Comment] = []
        for line in self._lines(data):  # cheap: a load generator reads them by the ten thousand
            if line.startswith(b"data: "):
                self._data.append(line[6:])
            elif line:
                self._take_field(line, found)
            else:
                if self._data:
                    found.append(ServerEvent(b"\n".join(self._data), self._event))
                self._data, self._event = [], MESSAGE
        if self._data or self._rest:
            self._check_size()
        return found

    def _check_size(self) -> None:
        if len(self._rest) + sum(map(len, self._data)) > self._max_bytes:
            raise BatonConnectionError(f"an event of more than {self._max_bytes} bytes")

    def _lines(self, data: bytes) -> list[bytes]:
        """The lines that have become whole."""
        if self._has_cr and data:
            data, self._has_cr = data.removeprefix(b"\n"), False
        if self._rest:
            data = self._rest + data
        lines = data.splitlines()
        if data.endswith(b"\n"):
            self._rest = b""
        elif data.endswith(b"\r"):
            self._rest, self._has_cr = b"", True
        else:
            self._rest = lines.pop() if lines else b""
        if self._is_first and lines:
            self._is_first, lines[0] = False, lines[0].removeprefix(_BOM)
        return lines

    def _take_field(self, line: bytes, found: list[ServerEvent | Comment]) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not name:
            found.append(Comment(value.decode("utf-8", "replace")))
        elif name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value.decode("utf-8", "replace") or MESSAGE
