"""A rank takes as much KV as it was told, or as its memory leaves; never what is not there."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kv_memory import (
    LargestStep,
    check_free,
    dry_run,
    part_of_device,
    plan_layout,
    sharing_ranks,
    size_pool,
)
from engine.rank_config import RankConfig
from kvcache import host_memory
from kvcache.host_memory import CPU_SHARE
from modeling.loader import load_model
from modeling.model import Model
from modeling.parallel import UnconnectedRank
from protocol.errors import ConfigError

MODEL = "arithmetic:layers=2,heads=4,kv_heads=2,vocab=512,max_len=4096"
CPU = torch.device("cpu")
LARGEST = LargestStep(num_tokens=512, num_rows=8, num_sequences=4_000)


def config(**fields: Any) -> RankConfig:
    return RankConfig(
        model=MODEL,
        pool_id="decode0",
        control_address="ipc:///x",
        token="t",
        listen="ipc:///x",
        block_size=16,
        tp_size=2,
        **fields,
    )


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(MODEL, tp=UnconnectedRank(0, 2), dtype="float32", device="cpu")


def block_bytes(model: Model) -> int:
    return plan_layout(config(), model.config, "float32", 1 << 20).num_bytes // (
        plan_layout(config(), model.config, "float32", 1 << 20).num_blocks
    )


def test_a_size_is_taken_as_it_is(model: Model) -> None:
    one = block_bytes(model)
    layout = size_pool(config(kv_memory_bytes=10 * one + 1), model, "float32", LARGEST)
    assert layout.num_blocks == 10 and layout.tp_size == 2


def test_auto_is_a_share_of_what_is_left(model: Model) -> None:
    one, left = block_bytes(model), 256 << 20
    budget = host_memory.resident_bytes() + left
    layout = size_pool(
        config(kv_memory_bytes=0, memory_budget_bytes=budget), model, "float32", LARGEST
    )
    assert 2 <= layout.num_blocks <= CPU_SHARE * left / one


def test_auto_takes_no_more_than_its_sequences_can_use(model: Model) -> None:
    few = LargestStep(num_tokens=512, num_rows=8, num_sequences=4)
    layout = size_pool(
        config(kv_memory_bytes=0, memory_budget_bytes=1 << 45), model, "float32", few
    )
    assert layout.num_blocks == few.num_sequences * 4096 // 16


@pytest.mark.parametrize(
    ("pool_sizes", "num_devices", "sharing"),
    [
        ((), 1, [1]),  # by itself
        ((1, 1), 1, [2]),  # a prefill and a decode rank on one GPU
        ((4, 2), 4, [2, 2, 1, 1]),
        ((4,), 2, [2, 2]),
        ((1, 1, 1), 8, [3, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_ranks_share_the_gpu_that_they_are_placed_on(
    pool_sizes: tuple[int, ...], num_devices: int, sharing: list[int]
) -> None:
    found = [sharing_ranks(pool_sizes, num_devices, index) for index in range(num_devices)]
    assert found == sharing


@given(
    st.lists(st.integers(0, 8 << 30), min_size=1, max_size=8), st.integers(0, 80 << 30), st.data()
)
def test_all_parts_of_a_gpu_are_no_more_than_it_has(
    weights: list[int], total: int, data: st.DataObject
) -> None:
    """Whether each of them looks before or after the others have loaded their weights."""
    taken = 0
    for own in weights:
        free = data.draw(st.integers(0, max(0, total - own)))
        part = part_of_device(free, total, own, len(weights))
        assert part <= free
        taken += own + max(0, part)
    assert taken <= total + sum(max(0, own - total // len(weights)) for own in weights)
    assert part_of_device(total - weights[0], total, weights[0], 1) == total - weights[0]


def test_nothing_left_is_refused_with_the_way_out(model: Model) -> None:
    with pytest.raises(ConfigError, match="--kv-memory auto: 0 MiB are left"):
        size_pool(config(kv_memory_bytes=0, memory_budget_bytes=1), model, "float32", LARGEST)


def test_what_is_not_free_is_not_touched(model: Model) -> None:
    with pytest.raises(ConfigError, match="--kv-memory: a rank would take"):
        size_pool(config(kv_memory_bytes=1 << 50), model, "float32", LARGEST)
    check_free(1 << 20, CPU)


def test_a_dry_run_needs_no_group(model: Model) -> None:
    one = plan_layout(config(), model.config, "float32", block_bytes(model))
    dry_run(model, one, 100, 8)
    dry_run(model, one, 1, 1)
