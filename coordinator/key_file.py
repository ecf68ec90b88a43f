"""The file of ``--api-key-file``: one key a line, read again and again while the cluster serves.

What has changed in it holds a second later, for requests that begin then; those that run go on. A
key is a tenant whatever file or flag it stands in, so one that comes back finds its cache. A file
that cannot be used (unreadable, no key, a bad one) changes nothing and is told: half a file must
neither shut everybody out nor let anybody in.
"""

import asyncio
import logging
from pathlib import Path

from coordinator.auth import Tenants
from coordinator.config import check_keys
from protocol.errors import ConfigError

INTERVAL_S = 1.0
MAX_FILE_BYTES = 16 << 20

_log = logging.getLogger(__name__)


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file. Empty lines and those that begin with ``#`` are none.

    Raises:
        ConfigError: it cannot be read, has no key, or one that cannot be a key.
    """
    flag = f"--api-key-file {path}"
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        lines = [line.strip() for line in content.decode("utf-8").splitlines()]
    except OSError as error:
        raise ConfigError(f"{flag}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flag}: not UTF-8 at byte {error.start}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{flag}: more than {MAX_FILE_BYTES} bytes")
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"{flag}: there is no key in it")
    check_keys(keys, flag)
    return keys


class KeyFile:
    """Keeps tenants as a file says, beside keys that do not change.

    Args:
        path: the file.
        fixed_keys: of flags and environment.
        tenants: are replaced.
    """

    def __init__(self, path: Path, fixed_keys: tuple[str, ...], tenants: Tenants) -> None:
        self._path = path
        self._fixed_keys = fixed_keys
        self._tenants = tenants
        self._error = ""

    def load(self) -> None:
        """Read it once.

        Raises:
            ConfigError: see :func:`read_keys`.
        """
        self._tenants.replace((*self._fixed_keys, *read_keys(self._path)))

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            await self._look()

    async def _look(self) -> None:
        try:
            keys = await asyncio.to_thread(read_keys, self._path)
        except ConfigError as error:
            if str(error) != self._error:  # once
                _log.error("%s; the keys stay as they were", error)
            self._error = str(error)
            return
        self._error = ""
        num_added, num_removed = self._tenants.replace((*self._fixed_keys, *keys))
        if num_added or num_removed:
            _log.info("API keys: %d added, %d removed", num_added, num_removed)
