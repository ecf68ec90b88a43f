"""The same ring over gloo between processes gives the same bits as between threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ring_attention.ring_cases import (
    DenseKernel,
    PositionKernel,
    RingCase,
    Share,
    digest,
    on_threads,
    process_cases,
)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DEADLINE_S = 120


def start_ranks(size: int, store_path: Path, mode: str) -> list[subprocess.Popen[str]]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [
                sys.executable,
                str(HERE / "gloo_rank.py"),
                str(rank),
                str(size),
                str(store_path),
                mode,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def outputs(ranks: list[subprocess.Popen[str]]) -> list[list[str]]:
    try:
        return [rank.communicate(timeout=DEADLINE_S)[0].splitlines() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize("size", [2, 3])
def test_gloo_equals_threads(tmp_path: Path, size: int) -> None:
    ranks = start_ranks(size, tmp_path / "store", "compare")
    lines = outputs(ranks)
    assert [rank.returncode for rank in ranks] == [0] * size
    for index, setup in enumerate(process_cases(size)):
        for rank, (_, out_TNH) in zip(setup.ring, shares(setup.build()), strict=True):
            assert lines[rank][index] == digest(out_TNH), f"{setup} on rank {rank}"


def shares(case: RingCase) -> list[Share]:
    kernel = PositionKernel() if case.setup.integers else DenseKernel()
    return on_threads(case.setup.ring, lambda rank, comm: case.attend(rank, comm, kernel))


def test_a_silent_process_ends_the_wait(tmp_path: Path) -> None:
    ranks = start_ranks(2, tmp_path / "store", "lost")
    assert outputs(ranks)[0] == ["PeerError"]
    assert [rank.returncode for rank in ranks] == [0, 0]
