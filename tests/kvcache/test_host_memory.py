"""What is left of memory is what the tightest of kernel and control groups leaves."""

from pathlib import Path

import pytest

from kvcache.host_memory import available, peak_bytes, reset_peak, resident_bytes, total_bytes

GIB = 1 << 30


def write(file: Path, text: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    """A /proc of a machine of 64 GiB, 40 of them free, and an empty /sys/fs/cgroup."""
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    write(proc / "meminfo", f"MemTotal: {64 << 20} kB\nMemAvailable: {40 << 20} kB")
    cgroup.mkdir()
    return proc, cgroup


def group(folder: Path, limit: object, used: int, cached: int) -> None:
    write(folder / "memory.max", limit)
    write(folder / "memory.current", used)
    write(folder / "memory.stat", f"anon 1\ninactive_file {cached}")


def test_without_groups_the_kernel_decides(machine: tuple[Path, Path]) -> None:
    assert available(*machine) == (40 * GIB, "free memory")
    write(machine[0] / "self/cgroup", "0::/somewhere/else")
    assert available(*machine).num_bytes == 40 * GIB
    assert total_bytes(*machine) == 64 * GIB


def test_the_tightest_group_decides_and_cached_files_count_as_free(
    machine: tuple[Path, Path],
) -> None:
    proc, cgroup = machine
    write(proc / "self/cgroup", "0::/pod/container")
    group(cgroup, "max", 30 * GIB, 0)
    group(cgroup / "pod", 16 * GIB, 10 * GIB, 2 * GIB)
    group(cgroup / "pod/container", 12 * GIB, 3 * GIB, 0)
    room = available(proc, cgroup)
    assert room.num_bytes == 8 * GIB and str(cgroup / "pod") in room.bound
    assert total_bytes(proc, cgroup) == 12 * GIB
    group(cgroup / "pod/container", 12 * GIB, 13 * GIB, 0)
    assert available(proc, cgroup).num_bytes == 0


def test_the_first_version_of_groups(machine: tuple[Path, Path]) -> None:
    proc, cgroup = machine
    write(proc / "self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/x")
    folder = cgroup / "memory/docker/x"
    write(folder / "memory.limit_in_bytes", 8 * GIB)
    write(folder / "memory.usage_in_bytes", 5 * GIB)
    write(folder / "memory.stat", f"total_inactive_file {GIB}")
    assert available(proc, cgroup).num_bytes == 4 * GIB


def test_the_peak_of_this_process_is_seen() -> None:
    reset_peak()
    before = resident_bytes()
    block = bytearray(64 << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
    del block
    assert peak_bytes() >= before + (60 << 20)
