"""The same ring over gloo between processes gives the same bits as between threads."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forks import end, outputs, shared_forks
from tests.ring_attention.ring_cases import (
    DenseKernel,
    PositionKernel,
    RingCase,
    Share,
    digest,
    on_threads,
    process_cases,
)

DEADLINE_S = 120


Run = Callable[[int, int, str], list[list[str]]]


@pytest.fixture
def run_ranks(tmp_path: Path) -> Run:
    """Runs ``cp_size * tp_size`` processes until they have ended well: the lines of each."""

    def run(cp_size: int, tp_size: int, mode: str) -> list[list[str]]:
        rest = [str(cp_size), str(tp_size), str(tmp_path / "store"), mode]
        ranks = [
            shared_forks().start("tests.ring_attention.gloo_rank", str(rank), *rest)
            for rank in range(cp_size * tp_size)
        ]
        try:
            said = [outputs(rank, DEADLINE_S) for rank in ranks]
        finally:
            for rank in ranks:
                end(rank)
        assert [rank.wait() for rank in ranks] == [0] * len(ranks), said
        return [lines.splitlines() for lines, _ in said]

    return run


@pytest.mark.parametrize(("cp_size", "tp_size"), [(2, 1), (3, 1), (2, 2)])
def test_gloo_equals_threads(run_ranks: Run, cp_size: int, tp_size: int) -> None:
    """With tp2, two rings of other content run beside each other over the same mesh."""
    lines = run_ranks(cp_size, tp_size, "compare")
    for tp_rank in range(tp_size):
        for index, setup in enumerate(process_cases(cp_size, seed=tp_rank)):
            for cp_rank, (_, out_TNH) in zip(setup.ring, shares(setup.build()), strict=True):
                line = lines[cp_rank * tp_size + tp_rank][index]
                assert line == digest(out_TNH), f"{setup} on cp rank {cp_rank}"


def shares(case: RingCase) -> list[Share]:
    kernel = PositionKernel() if case.setup.integers else DenseKernel()
    return on_threads(case.setup.ring, lambda rank, comm: case.attend(rank, comm, kernel))


def test_a_silent_process_ends_the_wait(run_ranks: Run) -> None:
    assert run_ranks(2, 1, "lost")[0] == ["PeerError"]
