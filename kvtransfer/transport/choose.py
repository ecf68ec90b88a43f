"""Which transport a rank uses: the one place that knows them all."""

import logging

from kvtransfer.transport.interface import KVTransport
from kvtransfer.transport.tcp import TcpTransport
from protocol.errors import ConfigError

_log = logging.getLogger(__name__)


def open_transport(
    name: str,
    incarnation: str,
    *,
    token: str = "",
    host: str = "127.0.0.1",
) -> KVTransport:
    """A transport that has not been started.

    Args:
        name: "nixl", "tcp", or "auto": NIXL where it runs, else TCP.
        incarnation: of this rank's process; unique for all time.
        token: the cluster's secret, which both ends prove to know.
        host: where TCP listens.

    Raises:
        ConfigError: there is no such transport, or it does not run here.
    """
    if name == "auto":
        try:
            return _open_nixl(incarnation, token)
        except ConfigError as error:
            _log.warning("KV moves over TCP: %s", error)
            return TcpTransport(incarnation, token, host)
    if name == "nixl":
        return _open_nixl(incarnation, token)
    if name == "tcp":
        return TcpTransport(incarnation, token, host)
    raise ConfigError(f"--transport {name}: choose one of auto, nixl, tcp")


def _open_nixl(incarnation: str, token: str) -> KVTransport:
    try:
        # Here, because the library is for Linux only and loads UCX.
        from kvtransfer.transport.nixl import NixlTransport
    except ImportError as error:
        raise ConfigError(f"NIXL is not installed ({error}): use --transport tcp") from error
    return NixlTransport(incarnation, token)
