"""Whether there is room on a disk, asked before anything is accepted."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coordinator.jobs.database import insufficient_storage

MIN_FREE_SHARE = 0.05
MIN_FREE_BYTES = 512 << 20
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, a limit of the process


def check_space(folder: Path, needed_bytes: int, *, min_free_bytes: int = MIN_FREE_BYTES) -> None:
    """Refuse what would leave a disk fuller than it may be.

    Raises:
        RequestError: ``insufficient_storage``, with both numbers.
    """
    usage = shutil.disk_usage(folder)
    reserve = max(int(MIN_FREE_SHARE * usage.total), min_free_bytes)
    # On a large disk five percent is a lot; ten times the least is enough anywhere.
    reserve = min(reserve, 10 * min_free_bytes)
    if usage.free - needed_bytes < reserve:
        raise insufficient_storage(
            f"{usage.free} bytes are free, {needed_bytes} are needed and {reserve} are kept free"
        )


@contextmanager
def told_when_full() -> Iterator[None]:
    """What the operating system says of a full disk, said to the caller."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise insufficient_storage("the disk is full") from error
        raise
