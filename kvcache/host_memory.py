"""The memory that this machine, or the container of this process, has left. No torch.

Linux has it in three places: what the kernel could give without swapping (MemAvailable of
/proc/meminfo, see proc(5)), and the limit and the use of each control group of this process
(memory.max and memory.current of cgroup v2, memory.limit_in_bytes and memory.usage_in_bytes of v1).
Cached pages of files count as used there, but the kernel frees them when memory is needed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# The share of the memory left by a rank's weights and largest step that --kv-memory auto takes for
# KV. On CPU, pre-empted KV, files' pages and other programs need the rest.
CPU_SHARE = 0.3
CUDA_SHARE = 0.9
PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


class Room(NamedTuple):
    """Memory that can still be had, and its bound, in words for an operator."""

    num_bytes: int
    bound: str


def available(proc: Path = PROC, cgroup: Path = CGROUP) -> Room:
    """The least of what the kernel and every control group above this process leave."""
    groups = (
        Room(max(0, g.limit - g.used), f"the limit of {g.folder}") for g in _groups(proc, cgroup)
    )
    rooms = [Room(_meminfo(proc, "MemAvailable"), "free memory"), *groups]
    return min(rooms, key=lambda room: room.num_bytes)


def total_bytes(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """The least of the machine's memory and the limits of our control groups, used or not."""
    return min([_meminfo(proc, "MemTotal"), *(group.limit for group in _groups(proc, cgroup))])


def resident_bytes(proc: Path = PROC) -> int:
    """Resident bytes of this process, now."""
    return _status(proc, "VmRSS")


def peak_bytes(proc: Path = PROC) -> int:
    """The most that was resident of this process since :func:`reset_peak`, or since its start."""
    return _status(proc, "VmHWM")


def reset_peak(proc: Path = PROC) -> None:
    """Let :func:`peak_bytes` begin anew; where the kernel does not allow it, nothing changes."""
    try:
        (proc / "self/clear_refs").write_text("5")
    except OSError:
        return


def _meminfo(proc: Path, field: str) -> int:
    return _kilobytes(proc / "meminfo", field)


def _status(proc: Path, field: str) -> int:
    return _kilobytes(proc / "self/status", field)


def _kilobytes(file: Path, field: str) -> int:
    for line in file.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


class _Group(NamedTuple):
    folder: Path
    limit: int
    used: int  # without the pages that the kernel would free when memory is needed


def _groups(proc: Path, cgroup: Path) -> Iterator[_Group]:
    """The groups of this process and those that they are in."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            yield from _walk(cgroup, path, names)
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _walk(cgroup / "memory", path, names)


def _walk(root: Path, path: str, names: tuple[str, str, str]) -> Iterator[_Group]:
    # Within a container the path may be the host's: what is not there is passed over.
    folder = root / path.lstrip("/")
    while True:
        group = _group(folder, names)
        if group is not None:
            yield group
        if folder == root or root not in folder.parents:
            return
        folder = folder.parent


def _group(folder: Path, names: tuple[str, str, str]) -> _Group | None:
    limit_name, usage_name, cached_name = names
    try:
        limit = (folder / limit_name).read_text().strip()
        used = int((folder / usage_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    return _Group(folder, int(limit), max(0, used - int(stat.get(cached_name, "0"))))
