"""The choice of a mover for a store's packs by ``--disk-io``."""

from kvcache.tiers.movers import FileMover, VectoredMover
from protocol.errors import ConfigError

_BACKENDS = {"nixl-posix": "POSIX", "nixl-gds": "GDS"}


def open_mover(name: str, memory: memoryview) -> FileMover:
    """The mover of ``--disk-io NAME`` for a store's memory; the caller closes it.

    Args:
        name: "vectored", "nixl-posix" or "nixl-gds".
        memory: all of it, writable.

    Raises:
        ConfigError: there is no such mover, or it does not run here.
    """
    if name == "vectored":
        return VectoredMover(memory)
    if name not in _BACKENDS:
        choices = ", ".join(("vectored", *_BACKENDS))
        raise ConfigError(f"--disk-io {name}: choose one of {choices}")
    try:
        # Here, because the library is for Linux only.
        from store.nixl_mover import NixlMover
    except ImportError as error:
        raise ConfigError(
            f"--disk-io {name}: NIXL is not installed ({error}), use --disk-io vectored"
        ) from error
    try:
        return NixlMover(memory, _BACKENDS[name])
    except ConfigError as error:
        raise ConfigError(f"--disk-io {name}: {error}; use --disk-io vectored") from error
