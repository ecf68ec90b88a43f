"""HTTP's listening socket, and uvicorn on it."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from coordinator.config import Limits
from coordinator.http.connections.accepting import Acceptor
from coordinator.http.connections.connection import GuardedConnection, guarded
from coordinator.http.connections.kept import Connections
from coordinator.loop.turns import Turns
from protocol.errors import ConfigError

KEEP_ALIVE_S = 75  # longer than clients keep idle connections, so that they close them first
BACKLOG = 4096  # connections that wait to be accepted; the kernel's own limit may be lower


def bind_http(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the host is unknown here, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--port {port}: cannot listen on {host}: {error.strerror}; choose another, or 0"
        ) from error
    listener.setblocking(False)
    return listener


def http_url(host: str, listener: socket.socket) -> str:
    """Where it listens."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers, and with our own way of accepting connections."""

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        connections: Connections[GuardedConnection],
        turns: Turns,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=guarded(limits, connections, turns),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=1,
            )
        )
        self.connections = connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        make_protocol = partial(
            cast(Callable[..., asyncio.Protocol], self.config.http_protocol_class),
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        acceptors = [Acceptor(one, make_protocol, self.connections) for one in sockets or ()]
        for acceptor in acceptors:
            acceptor.start()
        self.servers = acceptors  # type: ignore[assignment]  # closed like those of the loop
        self.started = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
