"""Whether jobs can be kept: told in ``/v1/cluster`` and in the log, looked at every few seconds.

A full disk is nobody's end. Completions need none; jobs, documents and files are refused with 507,
but for deletions, which the ballast is kept for. When there is room again everything goes on.
"""

import asyncio
import contextlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coordinator.jobs.ballast import Ballast
from coordinator.jobs.space import check_space
from protocol.errors import RequestError

INTERVAL_S = 2.0
SECRET_NAME = "secret"
OK, FULL = "ok", "full"

_log = logging.getLogger(__name__)


class Storage:
    """The disk of a data folder.

    Args:
        folder: the data folder.
        secret: of it, which is written down if the launcher found no room for it; "" if there is
            none.
        min_free_bytes: see ``check_space``.
    """

    def __init__(self, folder: Path, secret: str, min_free_bytes: int) -> None:
        self.ballast = Ballast(folder / "ballast")
        self._folder = folder
        self._secret = secret
        self._min_free_bytes = min_free_bytes
        self.refusal: Callable[[], str] = str  # why the database is not open, if it is not
        self._state = OK
        self._reason = ""

    def describe(self) -> dict[str, Any]:
        """As ``/v1/cluster`` has it."""
        return {
            "state": self._state,
            "reason": self._reason or None,
            "free_bytes": shutil.disk_usage(self._folder).free,
            "has_ballast": self.ballast.is_there,
        }

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.to_thread(self.look)
            await asyncio.sleep(INTERVAL_S)

    def look(self) -> None:
        """Take note of how full the disk is; keep the secret and the ballast, if there is room."""
        self.ballast.restore()
        if self._secret:
            with contextlib.suppress(OSError):
                keep_secret(self._folder / SECRET_NAME, self._secret)
        reason = self.refusal()
        try:
            check_space(self._folder, 0, min_free_bytes=self._min_free_bytes)
        except RequestError as error:
            reason = error.message
        state = FULL if reason else OK
        if state != self._state and state == FULL:
            _log.error("jobs, documents and files are refused: %s", reason)
        elif state != self._state:
            _log.warning("there is room on the disk again: jobs, documents and files are taken")
        self._state, self._reason = state, reason


def keep_secret(path: Path, secret: str) -> None:
    """Write the secret of a data folder, unless there is one. Durable when it returns.

    Raises:
        OSError: there is no room for it; nothing is left.
    """
    if path.exists():
        return
    part = path.with_suffix(".part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
