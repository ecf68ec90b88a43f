"""Clusters on virtual time: no seed may give a wrong token, leak a block or hang."""

import functools
import os
import subprocess
import sys

import pytest

from bench.simulate.event_loop import EventLoop, FaultModel
from bench.simulate.ranks import Memory
from tests.simulation.model import BLOCK_SIZE, layout, reference, states, token_of, total, write
from tests.simulation.scenario import FAULT_MODELS, run
from tests.sizes import some_of

NUM_QUICK = 210
NUM_THOROUGH = 20_000


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")


def assert_right(seeds: range) -> None:
    faults: set[str] = set()
    num_tokens = num_lost = 0
    for seed in seeds:
        outcome = run(seed)
        assert not outcome.problems, (
            f"{outcome.problems}; look with: "
            f"python -m tests.simulation --from {seed} --seeds 1 --trace"
        )
        faults |= outcome.faults.keys()
        num_tokens += outcome.num_tokens
        num_lost += outcome.num_attempts_lost
    kinds = {"killed", "late", "doubled", "corrupted", "failed", "left", "paused", "lost Announce"}
    assert kinds <= faults, f"faults that did not happen: {kinds - faults}"
    assert num_tokens > 20 * len(seeds) and num_lost > len(seeds) // 2


def test_a_slice_of_seeds() -> None:
    assert_right(range(some_of(NUM_QUICK)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_thousand_seeds() -> None:
    assert_right(range(NUM_THOROUGH))


def test_a_seed_is_the_same_each_time() -> None:
    assert run(11) == run(11)
    assert run(11).num_tokens != run(18).num_tokens


def test_every_fault_model_has_its_turn() -> None:
    assert len(set(FAULT_MODELS)) == len(FAULT_MODELS) == 7


def test_a_link_keeps_its_order_and_links_overtake_each_other() -> None:
    loop = EventLoop(0, FaultModel(late=0.3, late_s=1.0))
    arrived: list[tuple[str, int]] = []
    for number in range(50):
        for link in "ab":
            loop.send(link, functools.partial(arrived.append, (link, number)))
    assert loop.run_until(lambda: len(arrived) == 100, 10.0)
    for link in "ab":
        assert [number for name, number in arrived if name == link] == list(range(50))
    assert [name for name, _ in arrived] != ["a", "b"] * 50


@pytest.mark.parametrize("spoil", ["swap", "stale", "flip", None])
def test_the_model_needs_every_row_in_its_place(spoil: str | None) -> None:
    prompt = tuple(range(100, 112))
    ranks = [Memory(layout(8, rank, 2)) for rank in range(2)]
    table = [5, 0, 3]
    for memory in ranks:
        for position, state in enumerate(states(prompt)):
            write(memory, range(2), table[position // BLOCK_SIZE], position, state)
    if spoil == "swap":
        table = [0, 5, 3]
    elif spoil == "stale":
        table = [5, 1, 3]
    elif spoil == "flip":
        ranks[1].bytes[ranks[1].layout.offset(1, 3, 0)] ^= 1
    found = sum(
        total(memory, block, range(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE))
        for memory in ranks
        for index, block in enumerate(table)
    )
    assert (token_of(found) == reference(prompt, 1)[0]) is (spoil is None)


def test_a_seed_decides_everything() -> None:
    """Also in which order sets are walked through, which is another one in each process."""
    command = [sys.executable, "-P", "-m", "tests.simulation", "--seeds", "30", "--workers", "1"]
    found = []
    for hash_seed in "01":
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.append([line for line in done.stdout.splitlines() if "seeds in" not in line])
    assert found[0] == found[1]
