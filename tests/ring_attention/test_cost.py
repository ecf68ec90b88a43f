"""The cost model: the formulas, and what they decide."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling.checkpoint.config import ModelConfig
from ring_attention.cost import ChunkShape, CostModel

SHAPE = ChunkShape(
    num_layers=12,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    linear_weights=11_272_192,
    itemsize=2,
    block_size=32,
)
CPU = CostModel(75e9, 200e9, 1.2e9, 350e-6)


def test_the_shape_of_a_model() -> None:
    config = ModelConfig(
        architecture="llama",
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_layers=12,
        num_heads=16,
        num_kv_heads=4,
        head_dim=64,
        max_model_len=32768,
    )
    assert ChunkShape.of(config) == SHAPE
    half = ChunkShape.of(config, tp_size=2, dtype="float32")
    assert (half.num_heads, half.num_kv_heads, half.itemsize) == (8, 2, 4)
    assert half.linear_weights == SHAPE.linear_weights // 2


def test_short_prompts_never_ring_and_long_ones_do() -> None:
    sizes = [CPU.choose_ring_size(SHAPE, tokens, 0, (1, 2, 4)) for tokens in (1, 64, 127, 32768)]
    assert sizes == [1, 1, 1, 4]
    slow_link = CostModel(75e9, 200e9, 1.2e9, 10.0)
    assert slow_link.choose_ring_size(SHAPE, 32768, 0, (1, 2, 4)) == 1


def test_one_rank_costs_what_its_flops_cost() -> None:
    tokens, cached = 1024, 512
    linear = 2 * tokens * SHAPE.linear_weights / 200e9
    attention = 4 * tokens * (cached + tokens / 2) * 1024 / 75e9
    assert CPU.chunk_seconds(SHAPE, tokens, cached, 1) == pytest.approx(12 * (linear + attention))


@given(
    tokens=st.integers(1, 100_000),
    cached=st.integers(0, 100_000),
    size=st.sampled_from([2, 3, 4, 8]),
)
def test_no_ring_is_faster_than_its_ranks(tokens: int, cached: int, size: int) -> None:
    alone = CPU.chunk_seconds(SHAPE, tokens, cached, 1)
    assert size * CPU.chunk_seconds(SHAPE, tokens, cached, size) >= alone * (1 - 1e-9)


def test_pass_q_for_few_new_tokens_over_a_long_prefix() -> None:
    """arXiv 2411.01783: the miss rate decides where pass-KV's messages cannot hide."""
    fast = CostModel(5e14, 8e14, 45e9, 1e-5)
    assert fast.prefers_pass_q(SHAPE, 100, 100_000, 4)
    assert not fast.prefers_pass_q(SHAPE, 100, 100_000, 1)
    assert not fast.prefers_pass_q(SHAPE, 100_000, 0, 4)
    # Hidden from T = N C Hk e / (2 Hq BW) on: 4 * 5e14 * 4 * 2 / (2 * 16 * 45e9)
    threshold = 4 * 5e14 * 4 * 2 / (2 * 16 * 45e9)
    assert fast.prefers_pass_q(SHAPE, int(threshold) - 1, 10_000_000, 4) is False
    assert fast.prefers_pass_q(SHAPE, int(threshold) // 4, 10_000_000, 4)


@given(tokens=st.integers(1, 10_000), cached=st.integers(0, 200_000))
def test_more_cached_tokens_never_turn_pass_q_back(tokens: int, cached: int) -> None:
    model = CostModel(5e14, 8e14, 45e9, 1e-5)
    if model.prefers_pass_q(SHAPE, tokens, cached, 4):
        assert model.prefers_pass_q(SHAPE, tokens, cached + 1000, 4)
