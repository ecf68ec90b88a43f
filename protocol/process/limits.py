"""The limits of this process: open files and sockets, cores."""

import contextlib
import os
import resource


def max_open_files() -> int:
    """The limit that is in force."""
    return _finite(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def raise_open_files() -> int:
    """Raise the limit as far as the system allows. Children inherit it.

    The usual soft limit of 1024 is for programs that use ``select``, which nothing here does.

    Returns:
        The limit that is in force now.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # an infinite hard limit may not be settable
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max_open_files()


def _finite(limit: int) -> int:
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
