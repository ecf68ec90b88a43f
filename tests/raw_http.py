"""A request on a connection of its own, for tests that must know what the socket saw.

What is sent is a call of the client, and its parser reads the events; the connection is ours, to be
reset, left at any moment, and opened by the thousand.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator

import httptools
import msgspec

from baton_client import EventParser, ServerEvent
from baton_client.calls import Call
from baton_client.errors import BatonAPIError, api_error

Address = tuple[str, int]
_READ_BYTES = 1 << 16


def encode(call: Call, *, key: str = "", body: bytes | None = None) -> bytes:
    """A call as the bytes of a request.

    Args:
        call: its headers may name the request.
        key: the API key.
        body: instead of the call's own; may be no JSON.
    """
    content = msgspec.json.encode(call.body) if body is None else body
    headers = {
        "host": "localhost",
        "connection": "close",
        "x-request-id": uuid.uuid4().hex,
        "content-type": "application/json",
        "content-length": str(len(content)),
        **({"authorization": f"Bearer {key}"} if key else {}),
        **call.headers,
    }
    lines = [f"{call.method} {call.path} HTTP/1.1", *(f"{n}: {v}" for n, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + content


class Reply:
    """What a connection has brought so far."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.body = b""  # of what is no stream
        self.is_whole = False
        self._parser = httptools.HttpResponseParser(self)
        self._events = EventParser()
        self._found: list[ServerEvent] = []

    @property
    def status(self) -> int:
        return int(self._parser.get_status_code())

    @property
    def is_stream(self) -> bool:
        return "event-stream" in self.headers.get("content-type", "")

    @property
    def error(self) -> BatonAPIError | None:
        """What the answer says, if its status says that it is an error."""
        if not self.is_whole or self.status < 400:
            return None
        return api_error(self.status, self.body, None, self.headers.get("retry-after"))

    async def events(self, reader: asyncio.StreamReader) -> AsyncIterator[ServerEvent]:
        """The events, to the end of the answer or of the connection."""
        while not self.is_whole and (data := await reader.read(_READ_BYTES)):
            self._parser.feed_data(data)
            found, self._found = self._found, []
            for event in found:
                yield event

    # the parser's calls

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_body(self, data: bytes) -> None:
        if self.is_stream:
            self._found += [e for e in self._events.feed(data) if isinstance(e, ServerEvent)]
        else:
            self.body += data

    def on_message_complete(self) -> None:
        self.is_whole = True
