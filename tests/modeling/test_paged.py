"""Paged attention against one dense causal pass over the same tokens, in any mix of steps."""

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.pool import KVPool
from modeling.checkpoint.config import ModelConfig, load_config
from modeling.kernels.cpu_attention import CpuKernel
from modeling.kernels.partials import WINDOW_TILE
from modeling.paged import PagedAttention, PagedSequence
from protocol.kv import KVLayout
from tests.sizes import some_of

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 32, 2


@pytest.fixture(scope="module")
def kernel() -> CpuKernel:
    return CpuKernel()


def make_config(window: int | None) -> ModelConfig:
    """Both layers attend to other keys, and neither needs weights."""
    base = load_config(f"arithmetic:layers={LAYERS},heads={HEADS},kv_heads={KV_HEADS}")
    return msgspec.structs.replace(base, layer_windows=(None, window))


def make_pool(num_blocks: int, block_size: int, dtype: str) -> KVPool:
    layout = KVLayout(
        num_layers=LAYERS,
        num_blocks=num_blocks,
        num_kv_heads_total=KV_HEADS,
        tp_rank=0,
        tp_size=1,
        block_size=block_size,
        head_dim=HEAD_DIM,
        dtype=dtype,
    )
    return KVPool(layout)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """Causal attention of a whole sequence in fp64."""
    group = HEADS // KV_HEADS
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    hidden = (distance < 0) | (distance >= (window or 2**40))
    scores = torch.einsum("tnh,snh->nts", q.double(), k) / HEAD_DIM**0.5
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("nts,snh->tnh", weights, v)


def run_steps(
    kernel: CpuKernel,
    pool: KVPool,
    config: ModelConfig,
    qkv: list[torch.Tensor],
    steps: list[list[tuple[int, int]]],
) -> list[list[torch.Tensor]]:
    """Compute ``steps`` of (sequence, num_tokens); the outputs by layer and sequence."""
    block_size = pool.layout.block_size
    free = torch.randperm(pool.layout.num_blocks, generator=torch.Generator().manual_seed(1))
    sizes = [-(-x.shape[1] // block_size) for x in qkv]
    tables = [ids.int() for ids in free[: sum(sizes)].split(sizes)]
    done = [0] * len(qkv)
    outs = [[torch.empty(0)] * len(qkv) for _ in range(LAYERS)]
    for step in steps:
        batch = [PagedSequence(done[i], count, tables[i]) for i, count in step]
        context = PagedAttention(pool, kernel, config, batch)
        for layer in range(LAYERS):
            tokens = torch.cat([qkv[i][layer, done[i] : done[i] + count] for i, count in step])
            q, k, v = tokens.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
            out = context.attend(layer, q, k, v)
            assert out.dtype == q.dtype
            for (i, _), part in zip(step, out.split([count for _, count in step]), strict=True):
                outs[layer][i] = torch.cat([outs[layer][i].to(part.dtype), part])
        for i, count in step:
            done[i] += count
    return outs


def check(
    config: ModelConfig, qkv: list[torch.Tensor], outs: list[list[torch.Tensor]], error: float
) -> None:
    for layer, window in enumerate(config.layer_windows):
        for tokens, out in zip(qkv, outs[layer], strict=True):
            q, k, v = tokens[layer, : len(out)].split((HEADS, KV_HEADS, KV_HEADS), dim=1)
            want = dense(q, k, v, window)
            assert (out - want).norm() <= error * want.norm()


def make_tokens(length: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    shape = (LAYERS, length, HEADS + 2 * KV_HEADS, HEAD_DIM)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=some_of(40))
@given(st.data())
def test_any_mix_of_steps(kernel: CpuKernel, data: st.DataObject) -> None:
    counts = data.draw(
        st.lists(st.lists(st.sampled_from([1, 1, 1, 2, 7, 30, 64]), min_size=1, max_size=5),
                 min_size=1, max_size=4)
    )  # fmt: skip
    rng = data.draw(st.randoms(use_true_random=False))
    pending = [list(chunks) for chunks in counts]
    steps = []
    while any(pending):
        ready = [i for i, chunks in enumerate(pending) if chunks]
        rng.shuffle(ready)
        steps.append([(i, pending[i].pop(0)) for i in ready[: rng.randint(1, len(ready))]])
    block_size = data.draw(st.sampled_from([1, 3, 16, 32]))
    config = make_config(data.draw(st.sampled_from([None, 1, 5, 40])))
    qkv = [make_tokens(sum(chunks), i, torch.float32) for i, chunks in enumerate(counts)]
    num_blocks = sum(-(-sum(chunks) // block_size) for chunks in counts) + 1
    pool = make_pool(num_blocks, block_size, "float32")
    check(config, qkv, run_steps(kernel, pool, config, qkv, steps), 2e-6)


def test_bfloat16(kernel: CpuKernel) -> None:
    config = make_config(300)
    qkv = [make_tokens(length, length, torch.bfloat16) for length in (700, 33)]
    steps = [[(0, 400)], [(1, 32), (0, 1)], [(0, 1), (1, 1)], [(0, 298)]]
    pool = make_pool(24, 32, "bfloat16")
    check(config, qkv, run_steps(kernel, pool, config, qkv, steps), 6e-3)


def test_a_window_longer_than_its_tile(kernel: CpuKernel) -> None:
    config = make_config(WINDOW_TILE + 50)
    qkv = [make_tokens(3 * WINDOW_TILE, 0, torch.float32)]
    steps = [[(0, 2 * WINDOW_TILE)], [(0, WINDOW_TILE)]]
    pool = make_pool(48, 16, "float32")
    check(config, qkv, run_steps(kernel, pool, config, qkv, steps), 2e-6)


def test_batches_of_single_tokens_do_not_see_one_another(kernel: CpuKernel) -> None:
    """A sequence's decode output has the same bits alone and in any company."""
    config = make_config(None)
    qkv = [make_tokens(40, i, torch.bfloat16) for i in range(3)]
    prefill = [[(i, 39)] for i in range(3)]
    together = run_steps(
        kernel, make_pool(9, 16, "bfloat16"), config, qkv, [*prefill, [(2, 1), (0, 1), (1, 1)]]
    )  # fmt: skip
    pool = make_pool(9, 16, "bfloat16")
    alone = run_steps(kernel, pool, config, qkv, [*prefill, [(0, 1)], [(1, 1)], [(2, 1)]])
    for layer in range(LAYERS):
        for i in range(3):
            assert torch.equal(together[layer][i][-1], alone[layer][i][-1])


def test_the_batch_must_be_the_one_described(kernel: CpuKernel) -> None:
    pool = make_pool(4, 16, "float32")
    table = torch.arange(2, dtype=torch.int32)
    context = PagedAttention(pool, kernel, make_config(None), [PagedSequence(0, 5, table)])
    tokens = make_tokens(6, 0, torch.float32)[0]
    with pytest.raises(AssertionError, match="not the one described"):
        context.attend(0, *tokens.split((HEADS, KV_HEADS, KV_HEADS), dim=1))
