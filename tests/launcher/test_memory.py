"""What bounds the coordinator's memory is taken from the cgroup that it will run in."""

from pathlib import Path

import pytest

from launcher.memory import body_bytes, memory_bytes, text_worker_bytes

GIB = 1 << 30


def test_the_tightest_limit_above_counts(tmp_path: Path) -> None:
    cgroups, own = tmp_path / "cgroup", tmp_path / "own"
    inner = cgroups / "a" / "b"
    inner.mkdir(parents=True)
    own.write_text("0::/a/b\n")
    whole = memory_bytes(cgroups, own)
    (inner / "memory.max").write_text("max\n")
    assert memory_bytes(cgroups, own) == whole
    (cgroups / "a" / "memory.max").write_text(f"{GIB}\n")
    assert memory_bytes(cgroups, own) == min(whole, GIB)
    (inner / "memory.max").write_text("1000\n")
    assert memory_bytes(cgroups, own) == 1000


@pytest.mark.parametrize(
    ("memory", "bodies", "worker"),
    [(GIB // 4, GIB // 16, GIB // 2), (GIB, GIB // 8, GIB // 2), (64 * GIB, GIB, 4 * GIB)],
)
def test_shares(memory: int, bodies: int, worker: int) -> None:
    assert (body_bytes(memory), text_worker_bytes(memory)) == (bodies, worker)
