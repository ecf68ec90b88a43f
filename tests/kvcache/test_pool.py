"""The KV tensor: slots, gathers and host copies against plain indexing."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from kvcache.pool import KVPool
from protocol.errors import ConfigError
from protocol.kv import KVLayout
from tests.sizes import some_of

LAYOUT = KVLayout(
    num_layers=2,
    num_blocks=9,
    num_kv_heads_total=6,
    tp_rank=1,
    tp_size=2,
    block_size=4,
    head_dim=8,
    dtype="float32",
)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@settings(max_examples=some_of(40))
@given(st.permutations(range(9)), st.integers(1, 36), st.booleans())
def test_what_is_written_is_gathered(block_ids: list[int], num_tokens: int, uses_out: bool) -> None:
    pool = KVPool(LAYOUT)
    k_TKH, v_TKH = _random(num_tokens, 3, 8), _random(num_tokens, 3, 8) + 1
    slots = torch.tensor([block_ids[t // 4] * 4 + t % 4 for t in range(num_tokens)])
    pool.write(1, slots, k_TKH, v_TKH)
    for t in range(num_tokens):
        block, offset = block_ids[t // 4], t % 4
        assert torch.equal(pool.layer(1)[block, :, 0, offset], k_TKH[t])
        assert torch.equal(pool.layer(1)[block, :, 1, offset], v_TKH[t])
    assert not pool.layer(0).any()
    out = pool.new_scratch(num_tokens) if uses_out else None
    k_SKH, v_SKH = pool.gather(1, block_ids, num_tokens, out)
    assert torch.equal(k_SKH, k_TKH)
    assert torch.equal(v_SKH, v_TKH)
    assert k_SKH.stride(-1) == 1


def test_one_token_of_each_of_several_sequences() -> None:
    pool = KVPool(LAYOUT)
    k_TKH, v_TKH = _random(3, 3, 8), _random(3, 3, 8)
    rows = pool.rows(torch.tensor([35, 0, 17]))
    pool.write_rows(0, rows, k_TKH.transpose(0, 1).contiguous().transpose(0, 1), v_TKH)
    assert torch.equal(pool.layer(0)[8, :, 0, 3], k_TKH[0])
    assert torch.equal(pool.layer(0)[4, :, 1, 1], v_TKH[2])
    assert int((pool.tensor != 0).sum()) == 3 * 3 * 2 * 8


def test_blocks_go_to_the_host_and_come_back_elsewhere() -> None:
    pool = KVPool(LAYOUT)
    pool.tensor.copy_(_random(*LAYOUT.shape))
    before = pool.tensor.clone()
    saved = pool.save([5, 2])
    pool.tensor[:, [5, 2]] = 0
    pool.restore([0, 5], saved)
    assert torch.equal(pool.tensor[:, 0], before[:, 5])
    assert torch.equal(pool.tensor[:, 5], before[:, 2])
    assert torch.equal(pool.tensor[:, 7], before[:, 7])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_offsets_of_the_layout_are_addresses(dtype: str) -> None:
    layout = KVLayout(2, 3, 4, 0, 2, 4, 8, dtype)
    pool = KVPool(layout)
    assert pool.base_address % 4096 == 0
    assert pool.tensor.is_contiguous()
    assert len(pool.view()) == layout.num_bytes
    address = pool.tensor[1, 2, 1].data_ptr() - pool.base_address
    assert address == layout.offset(1, 2, 1)
    pool.view()[address] = 255
    assert pool.tensor[1, 2, 1].any()


@pytest.mark.gpu
def test_the_same_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pool, reference = KVPool(LAYOUT, "cuda"), KVPool(LAYOUT)
    k_TKH, v_TKH = _random(11, 3, 8), _random(11, 3, 8) + 1
    slots = torch.tensor([[7, 2, 3][t // 4] * 4 + t % 4 for t in range(11)])
    reference.write(1, slots, k_TKH, v_TKH)
    pool.write(1, slots.cuda(), k_TKH.cuda(), v_TKH.cuda())
    assert torch.equal(pool.tensor.cpu(), reference.tensor)
    k_SKH, v_SKH = pool.gather(1, [7, 2, 3], 11)
    assert torch.equal(k_SKH.cpu(), k_TKH)
    assert torch.equal(v_SKH.cpu(), v_TKH)
    pool.restore([0, 1], pool.save([7, 2]))
    assert torch.equal(pool.tensor[:, 0].cpu(), reference.tensor[:, 7])
    with pytest.raises(ConfigError):
        pool.view()
