"""uvicorn's HTTP connection, with the limits that it does not have.

A head that is too large, or that does not arrive in time, ends the connection; so does an HTTP/1.1
request without a Host, or a body whose length is in doubt (RFC 9112, 6.3). A response whose reader
has stopped can be cut off: a plain close would wait for the reader for ever.
"""

import asyncio
from functools import partial
from typing import cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from coordinator.config import Limits
from coordinator.http.connections.kept import Connections
from coordinator.loop.timeouts import Countdown
from coordinator.loop.turns import URGENT_PATHS, Lane, Turns

SCOPE_ABORT = "baton.abort_connection"
_URGENT = tuple(f"GET {path}".encode() for path in URGENT_PATHS)
_TOO_LARGE = (
    431,
    "Request Header Fields Too Large",
    "the header is too large",
    "headers_too_large",
)
_TOO_SLOW = (408, "Request Timeout", "the header did not arrive in time", "header_timeout")
_NO_HOST = (400, "Bad Request", "the Host header is missing or double", "invalid_host")
_NO_SUCH_CODING = (
    501,
    "Not Implemented",
    "the one Transfer-Encoding that is understood is chunked",
    "unsupported_transfer_encoding",
)


class GuardedConnection(HttpToolsProtocol):
    """One connection. The keywords named here are bound by :func:`guarded`."""

    def __init__(
        self,
        *args: object,
        limits: Limits,
        connections: "Connections[GuardedConnection]",
        turns: Turns,
        **kwargs: object,
    ) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # passed through as they came
        self._limits = limits
        self._all = connections
        self._turns = turns
        self._unread: list[bytes] = []
        self._head_bytes = 0
        self._is_in_head = True
        self._head_timer: Countdown | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._all.opened(self)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._all.closed(self)
        super().connection_lost(exc)

    def close_idle(self) -> None:
        """Make room for another connection; no request is at work here."""
        self.transport.close()

    def data_received(self, data: bytes) -> None:
        """What arrives on thousands of connections together is read in several passes.

        Whoever asks how we are does not wait for the others.
        """
        if not self._unread and data.startswith(_URGENT):
            self._feed(data)
            return
        self._unread.append(data)
        if len(self._unread) == 1:
            self._turns.call(Lane.NEW, self._read)
            if self._unread:
                self._all.at_work(self)  # nobody knows yet whether that is a whole head
                self.transport.pause_reading()

    def _read(self) -> None:
        unread, self._unread = self._unread, []
        for data in unread:
            if self.parser is not None and not self.transport.is_closing():  # not lost meanwhile
                self._feed(data)
        if self._is_in_head and (self.cycle is None or self.cycle.response_complete):
            self._all.answered(self)
        if not self.transport.is_closing() and not self.flow.read_paused:
            self.transport.resume_reading()

    def _feed(self, data: bytes) -> None:
        if self._is_in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        # What came with the head's end was counted too, so only an unfinished head is judged.
        if self._is_in_head and self._head_bytes > self._limits.max_header_bytes + 8192:
            self._refuse(*_TOO_LARGE)

    def on_message_begin(self) -> None:
        self._is_in_head = True
        self._head_bytes = 0
        self._start_timer()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._all.at_work(self)
        self._is_in_head = False
        if self.transport.is_closing():  # behind a refused request nothing is one: it may be a body
            return
        codings = [value for name, value in self.headers if name == b"transfer-encoding"]
        if codings and not self._is_chunked(codings):
            self._refuse(*_NO_SUCH_CODING)
            return
        num_hosts = sum(name == b"host" for name, _ in self.headers)
        if num_hosts != 1 and self.parser.get_http_version() == "1.1":
            self._refuse(*_NO_HOST)
            return
        cast(dict[str, object], self.scope)[SCOPE_ABORT] = self.transport.abort
        super().on_headers_complete()

    def _is_chunked(self, codings: list[bytes]) -> bool:
        """Whether a body is just chunked: what else is around it would be taken for its text."""
        is_chunked = [coding.strip().lower() for coding in codings] == [b"chunked"]
        return is_chunked and self.parser.get_http_version() == "1.1"

    def send_400_response(self, msg: str) -> None:
        del msg
        self._refuse(400, "Bad Request", "this is no HTTP that is understood here", "invalid_http")

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_head = True  # the next request's
        self._head_bytes = 0
        if not self.transport.is_closing():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle is None or self.cycle.response_complete:  # else a pipelined one has begun
            self._all.answered(self)

    def _start_timer(self) -> None:
        self._stop_timer()
        self._head_timer = Countdown(
            self.loop, self._limits.header_timeout_s, lambda: self._refuse(*_TOO_SLOW)
        )

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: int, phrase: str, message: str, code: str) -> None:
        if self.transport.is_closing():
            return
        body = (
            f'{{"error":{{"message":"{message}","type":"invalid_request_error",'
            f'"param":null,"code":"{code}"}}}}'
        )
        head = (
            f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write((head + body).encode("ascii"))
        self.transport.close()


def guarded(
    limits: Limits, connections: Connections[GuardedConnection], turns: Turns
) -> type[asyncio.Protocol]:
    """The protocol for ``uvicorn.Config(http=...)``; it only ever calls what it is given."""
    return partial(  # type: ignore[return-value]
        GuardedConnection, limits=limits, connections=connections, turns=turns
    )
