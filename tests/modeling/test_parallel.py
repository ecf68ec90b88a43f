"""Tensor-parallel groups of real processes."""

import os
import shutil
from collections.abc import Callable

import pytest
import torch

from launcher.supervise.forks import ForkedProcess
from modeling.kernels.native_build import COMPILERS
from modeling.parallel import SingleRank, init_gang, make_tensor_parallel, open_gang_store
from protocol.errors import PeerError
from tests.forks import end, outputs, shared_forks

DEADLINE_S = 90.0

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="no C++ compiler for the shared-memory library"
)
kinds = pytest.mark.parametrize("kind", [pytest.param("shm", marks=needs_compiler), "gloo"])


Result = tuple[int, str]
RunGang = Callable[[str, int, str], list[Result]]


@pytest.fixture
def run_gang() -> RunGang:
    """Runs a scenario in so many processes of a kind: (exit code, output) of every rank."""

    def run(scenario: str, size: int, kind: str) -> list[Result]:
        address, listen_fd = open_gang_store("127.0.0.1")
        ranks: list[ForkedProcess] = []
        try:
            for rank in range(size):
                fd = listen_fd if rank == 0 else -1
                arguments = [scenario, str(rank), str(size), address, kind, str(fd)]
                fds = [fd] if fd >= 0 else []
                module = "tests.modeling.parallel_rank"
                ranks.append(shared_forks().start(module, *arguments, pass_fds=fds))
            said = ["".join(outputs(rank, DEADLINE_S)) for rank in ranks]
            return [(rank.wait(), text) for rank, text in zip(ranks, said, strict=True)]
        finally:
            os.close(listen_fd)
            for process in ranks:
                end(process)

    return run


def said(result: Result) -> str:
    code, output = result
    lines = [line.split()[1] for line in output.splitlines() if line.startswith("OK")]
    assert code == 0 and lines, output
    return lines[0]


@pytest.mark.parametrize(
    ("kind", "size"),
    [pytest.param("shm", 2, marks=needs_compiler), pytest.param("shm", 3, marks=needs_compiler),
     ("gloo", 2)],
)  # fmt: skip
def test_every_rank_has_the_same_bits_and_nothing_is_left_open(
    run_gang: RunGang, kind: str, size: int
) -> None:
    assert len({said(result) for result in run_gang("agree", size, kind)}) == 1


@kinds
def test_a_dead_rank_is_noticed(run_gang: RunGang, kind: str) -> None:
    *others, dead = run_gang("die", 3, kind)
    assert dead[0] == -9
    assert {said(result) for result in others} == {"noticed"}


@needs_compiler
def test_a_rank_that_leaves_is_noticed_at_once(run_gang: RunGang) -> None:
    stays, leaves = run_gang("leave", 2, "shm")
    assert (said(stays), said(leaves)) == ("noticed", "left")


@needs_compiler
def test_ranks_that_disagree_on_the_size_are_told(run_gang: RunGang) -> None:
    assert {said(result) for result in run_gang("disagree", 2, "shm")} == {"noticed"}


def test_a_gang_that_nobody_leads_is_given_up() -> None:
    address, listen_fd = open_gang_store("127.0.0.1")
    os.close(listen_fd)
    with pytest.raises(PeerError, match="forming the gang"):
        init_gang(address, 1, 2, "gloo", 1.0)


def test_one_rank_needs_no_group() -> None:
    tp = make_tensor_parallel(3, 4, 1, torch.device("cpu"), same_host=True)
    assert isinstance(tp, SingleRank)
    x = torch.randn(4)
    before = x.clone()
    tp.all_reduce_(x)
    assert torch.equal(x, before) and tp.all_gather(x, 0) is x
