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


def start_ranks(
    cp_size: int, tp_size: int, store_path: Path, mode: str
) -> list[subprocess.Popen[str]]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(HERE / "gloo_rank.py")]
    rest = [str(cp_size), str(tp_size), str(store_path), mode]
    return [
        subprocess.Popen(
            [*command, str(rank), *rest], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in range(cp_size * tp_size)
    ]


def outputs(ranks: list[subprocess.Popen[str]]) -> list[list[str]]:
    try:
        return [rank.communicate(timeout=DEADLINE_S)[0].splitlines() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize(("cp_size", "tp_size"), [(2, 1), (3, 1), (2, 2)])
def test_gloo_equals_threads(tmp_path: Path, cp_size: int, tp_size: int) -> None:
    """With tp2, two rings of other content run beside each other over the same mesh."""
    ranks = start_ranks(cp_size, tp_size, tmp_path / "store", "compare")
    lines = outputs(ranks)
    assert [rank.returncode for rank in ranks] == [0] * len(ranks)
    for tp_rank in range(tp_size):
        for index, setup in enumerate(process_cases(cp_size, seed=tp_rank)):
            for cp_rank, (_, out_TNH) in zip(setup.ring, shares(setup.build()), strict=True):
                line = lines[cp_rank * tp_size + tp_rank][index]
                assert line == digest(out_TNH), f"{setup} on cp rank {cp_rank}"


def shares(case: RingCase) -> list[Share]:
    kernel = PositionKernel() if case.setup.integers else DenseKernel()
    return on_threads(case.setup.ring, lambda rank, comm: case.attend(rank, comm, kernel))


def test_a_silent_process_ends_the_wait(tmp_path: Path) -> None:
    ranks = start_ranks(2, 1, tmp_path / "store", "lost")
    assert outputs(ranks)[0] == ["PeerError"]
    assert [rank.returncode for rank in ranks] == [0, 0]
