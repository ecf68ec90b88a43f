"""The socket that HTTP is served on."""

import socket

from protocol.errors import ConfigError

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
