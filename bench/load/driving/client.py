"""HTTP/1.1 to one server, by callbacks: at 20,000 events a second every frame between counts.

1. ``Client.send`` takes an idle connection, or makes one, and hands the request to the kernel.
2. Bytes are stamped as they arrive, before anything reads them, and go to the request's ``Reply``.
3. One timer per request watches its budgets and its planned end. Leaving is closing the connection.
4. A connection whose answer has ended as it should serves the next request. One that the server had
   closed in the meantime, before any byte of an answer, is replaced once.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import httpx
import msgspec

from bench.load.driving.reply import Reply
from protocol.errors import ConfigError

_MAX_IDLE_S = 3.0  # less than any server's keep-alive


class Budgets(msgspec.Struct, frozen=True):
    """How long anything may take. A keep-alive comment is a byte, so it renews ``silence_s``."""

    connect_s: float = 10.0
    silence_s: float = 120.0
    total_s: float = 600.0


class Address(msgspec.Struct, frozen=True):
    """Where a server is."""

    host: str
    port: int
    prefix: str
    is_tls: bool

    @classmethod
    def parse(cls, url: str) -> "Address":
        """Of ``http://HOST:PORT/PREFIX``; a trailing ``/v1`` is dropped, as clients have it.

        Raises:
            ConfigError: not a URL of a server.
        """
        try:
            parts = urlsplit(url if "//" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{url!r}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is not the URL of a server, like http://127.0.0.1:8000")
        is_tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if is_tls else 80), prefix, is_tls)


@dataclass(slots=True)
class _Exchange:
    """One request on its connection."""

    reply: Reply
    ended: "asyncio.Future[None]"
    has_bytes: bool = False
    timer: asyncio.TimerHandle | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Instants of one request."""

    budgets: Budgets
    total_at: float
    cancel_at: float | None = None

    def verdict(self, last_byte_at: float, now: float) -> str | None:
        """What is to become of a request that has not ended by now."""
        if self.cancel_at is not None and now >= self.cancel_at:
            return "cancelled"
        if now >= min(self.total_at, last_byte_at + self.budgets.silence_s):
            return "timeout"
        return None

    def next_at(self, last_byte_at: float) -> float:
        first = min(self.total_at, last_byte_at + self.budgets.silence_s)
        return first if self.cancel_at is None else min(first, self.cancel_at)


class _Connection(asyncio.Protocol):
    """One TCP connection; at most one request at a time."""

    def __init__(self, park: Callable[["_Connection"], None]) -> None:
        self._park = park
        self._exchange: _Exchange | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._now = 0.0
        self._transport: asyncio.Transport | None = None
        self.idle_since = 0.0

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def begin(self, exchange: _Exchange, payload: bytes) -> None:
        assert self._transport is not None
        self._exchange = exchange
        self._transport.write(payload)

    def abort(self) -> None:
        """Leave, without waiting for anything."""
        if self._transport is not None:
            self._transport.abort()

    # asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has no such base

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        exchange = self._exchange
        if exchange is None:
            self.abort()  # nothing was asked
            return
        exchange.has_bytes = True
        exchange.reply.last_byte_at = self._now
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._finish("http_error", "malformed_http")
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._now = time.monotonic()
        exchange = self._exchange
        if exchange is not None and exchange.reply.status == 200 and exc is None:
            exchange.reply.end(self._now)  # an answer may end with its connection
        self._finish("disconnect", type(exc).__name__ if exc else "closed")

    # the parser's calls

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self._exchange is not None:
            status = self._parser.get_status_code()
            self._exchange.reply.take_head(status, self._headers, self._now)
        self._headers = {}

    def on_body(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is not None and exchange.reply.take_body(data, self._now):
            exchange.reply.end(self._now)
            self._release()

    def on_message_complete(self) -> None:
        if self._exchange is not None:
            self._exchange.reply.end(self._now)
            self._release()
        if self._parser.should_keep_alive() and self.is_open:
            self.idle_since = self._now
            self._park(self)
        else:
            self.abort()

    def _finish(self, outcome: str, error_code: str) -> None:
        if self._exchange is not None:
            self._exchange.reply.close(outcome, self._now, error_code)
            self._release()

    def _release(self) -> None:
        """The request is over, whatever the connection does next."""
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            return
        if exchange.timer is not None:
            exchange.timer.cancel()
        if not exchange.ended.done():
            exchange.ended.set_result(None)

    def give_up(self, outcome: str, error_code: str = "") -> None:
        """Close the connection under a request that has not ended."""
        self._now = time.monotonic()
        self._finish(outcome, error_code)
        self.abort()


@dataclass(slots=True)
class Client:
    """All connections to one server.

    Args:
        headers: sent with every request.
    """

    address: Address
    budgets: Budgets
    headers: dict[str, str] = field(default_factory=dict)
    num_connections: int = 0
    _idle: list[_Connection] = field(default_factory=list)
    _busy: set[_Connection] = field(default_factory=set)
    _is_closed: bool = False
    _peer: tuple[str, int] | None = None
    _tls: dict[str, Any] = field(default_factory=dict)

    async def resolve(self) -> None:
        """Look the host's name up once, so that no request waits for it.

        Raises:
            ConfigError: nobody knows the name.
        """
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                self.address.host, self.address.port, proto=6
            )
        except OSError as error:
            raise ConfigError(f"{self.address.host}: {error.strerror}") from error
        host, port = found[0][4][:2]
        self._peer = str(host), int(port)
        if self.address.is_tls:
            self._tls = {
                "ssl": httpx.create_ssl_context(),  # whom the rest of the harness trusts
                "server_hostname": self.address.host,
            }

    def head(self, path: str, num_bytes: int, more: dict[str, str]) -> bytes:
        """The head of a POST."""
        host = self.address.host if ":" not in self.address.host else f"[{self.address.host}]"
        lines = [
            f"POST {self.address.prefix}{path} HTTP/1.1",
            f"host: {host}:{self.address.port}",
            "content-type: application/json",
            "accept: text/event-stream",
            f"content-length: {num_bytes}",
            *(f"{name}: {value}" for name, value in {**self.headers, **more}.items()),
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    async def send(self, payload: bytes, reply: Reply, cancel_at: float | None = None) -> None:
        """Send one request and return when it has ended, one way or another."""
        now = reply.last_byte_at = time.monotonic()
        limits = Limits(self.budgets, now + self.budgets.total_s, cancel_at)
        while (connection := self._take()) is not None:
            exchange = await self._exchange(connection, payload, reply, limits)
            if exchange.has_bytes or reply.outcome in ("cancelled", "timeout"):
                return
            reply.outcome = reply.error_code = ""  # the server had closed it: nothing was lost
            reply.finished_at = None
        fresh = await self._connect(reply, limits)
        if fresh is not None:
            await self._exchange(fresh, payload, reply, limits)

    def _take(self) -> _Connection | None:
        oldest = time.monotonic() - _MAX_IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and connection.idle_since >= oldest:
                return connection
            connection.abort()
        return None

    async def _exchange(
        self, connection: _Connection, payload: bytes, reply: Reply, limits: Limits
    ) -> _Exchange:
        loop = asyncio.get_running_loop()
        exchange = _Exchange(reply, loop.create_future())

        def check() -> None:
            if exchange.ended.done():
                return
            now = time.monotonic()
            verdict = limits.verdict(reply.last_byte_at, now)
            if verdict is not None:
                connection.give_up(verdict)
            else:
                wait_s = limits.next_at(reply.last_byte_at) - now
                exchange.timer = loop.call_later(wait_s, check)

        self._busy.add(connection)
        connection.begin(exchange, payload)
        if self._is_closed:
            connection.give_up("timeout", "run_stopped")
        check()
        await exchange.ended
        self._busy.discard(connection)
        return exchange

    async def _connect(self, reply: Reply, limits: Limits) -> _Connection | None:
        """A new connection, or None with the reply closed."""
        loop = asyncio.get_running_loop()
        assert self._peer is not None, "resolve() comes first"
        begun = time.monotonic()
        until = min(begun + self.budgets.connect_s, limits.next_at(begun))
        self.num_connections += 1
        try:
            async with asyncio.timeout(until - begun):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._idle.append), *self._peer, **self._tls
                )
        except TimeoutError:
            now = time.monotonic()
            outcome = limits.verdict(reply.last_byte_at, now) or "timeout"
            reply.close(outcome, now, "connect" if outcome == "timeout" else "")
            return None
        except OSError as error:
            reply.close("refused", time.monotonic(), type(error).__name__)
            return None
        return connection

    def close(self) -> None:
        """Close every connection; requests that have not ended are given up."""
        self._is_closed = True
        for connection in self._busy:
            connection.give_up("timeout", "run_stopped")
        for connection in self._idle:
            connection.abort()
        self._idle.clear()
