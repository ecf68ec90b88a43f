"""How much memory there is for this process and its children: the machine's, or its cgroup's."""

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_GIB, _MIB = 1 << 30, 1 << 20


def memory_bytes(cgroups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """The least of the machine's memory and the limits of the cgroups that this process is in."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds in ("", "memory"):
            folder = cgroups / kinds / path.lstrip("/")
            for parent in (folder, *folder.parents[: len(folder.relative_to(cgroups).parts)]):
                limits += _limits_in(parent)
    return min(limits)


def _limits_in(folder: Path) -> list[int]:
    found = []
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            text = (folder / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # else "max"
            found.append(int(text))
    return found


def body_bytes(memory: int) -> int:
    """Of all bodies of requests that are in flight: an eighth, and no more than a GiB."""
    return max(64 * _MIB, min(_GIB, memory // 8))


def text_worker_bytes(memory: int) -> int:
    """Of the address space of a process that reads requests: a quarter, within reason."""
    return max(512 * _MIB, min(4 * _GIB, memory // 4))
