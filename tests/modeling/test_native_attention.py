"""The bf16 kernel for pieces, against dense attention in fp64 and against itself."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.kernels.native_attention import MIN_ROWS, NativeAttention
from tests.modeling.test_cpu_attention import check, dense, make
from tests.sizes import some_of

BF16 = torch.bfloat16
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def kernel() -> NativeAttention:
    kernel = NativeAttention()
    if not kernel.is_usable:
        pytest.skip("no C++ compiler here, or a CPU without AVX512-BF16")
    return kernel


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def piece(num_queries: int, num_keys: int, shape: tuple[int, int, int], seed: int = 0) -> Tensors:
    num_heads, num_kv_heads, head_dim = shape
    q = make(num_queries, num_heads, head_dim, dtype=BF16, seed=seed)
    k = make(num_keys, num_kv_heads, head_dim, dtype=BF16, seed=seed + 1)
    return q, k, make(num_keys, num_kv_heads, head_dim, dtype=BF16, seed=seed + 2)


def visible(num_queries: int, num_keys: int, *, is_causal: bool) -> torch.Tensor:
    everything = torch.ones(num_queries, num_keys, dtype=torch.bool)
    return everything.tril() if is_causal else everything


def check_piece(kernel: NativeAttention, tensors: Tensors, *, is_causal: bool) -> None:
    q, k, _ = tensors
    assert kernel.takes(q, k)
    want = dense(*tensors, visible(len(q), len(k), is_causal=is_causal))
    check(kernel.attend(*tensors, is_causal=is_causal), want)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("num_keys", [16, 63, 64, 65, 192, 255, 256, 257, 385, 520])
def test_around_every_edge_of_a_block(
    kernel: NativeAttention, num_keys: int, is_causal: bool
) -> None:
    num_queries = num_keys if is_causal else 23
    check_piece(kernel, piece(num_queries, num_keys, (4, 2, 64)), is_causal=is_causal)


@settings(max_examples=some_of(40))
@given(
    num_queries=st.integers(MIN_ROWS, 400),
    num_keys=st.integers(1, 600),
    group=st.integers(1, 5),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 48, 64, 80, 96, 128, 256]),
    is_causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_piece(
    kernel: NativeAttention,
    num_queries: int,
    num_keys: int,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    is_causal: bool,
    seed: int,
) -> None:
    shape = (group * num_kv_heads, num_kv_heads, head_dim)
    num_keys = num_queries if is_causal else num_keys
    check_piece(kernel, piece(num_queries, num_keys, shape, seed), is_causal=is_causal)


def test_scores_far_from_zero_do_not_overflow(kernel: NativeAttention) -> None:
    """One key outweighs all others by more than an exponent can hold, wherever it lies."""
    for position in (0, 100, 300):
        q, k, v = piece(32, 301, (2, 1, 64))
        k[position] = 40 * q[0, 0]
        out, lse = kernel.attend(q, k, v, is_causal=False)
        assert torch.isfinite(out).all() and torch.isfinite(lse).all()
        assert torch.equal(out[0, 0], v[position, 0])


def test_strided_pieces(kernel: NativeAttention) -> None:
    """q, k and v as slices of one packed projection, and as slices of blocks by head."""
    qkv = make(70, 12, 64, dtype=BF16)
    tensors = qkv[:, :8], qkv[:, 8:10], qkv[:, 10:]
    check_piece(kernel, tensors, is_causal=True)
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors)
    check_piece(kernel, (q, k, v), is_causal=True)


def test_what_lies_behind_the_last_key_is_not_read(kernel: NativeAttention) -> None:
    q, k, v = piece(20, 300, (2, 1, 64))
    want = kernel.attend(q, k[:70], v[:70], is_causal=False)
    k[70:], v[70:] = torch.nan, torch.nan
    got = kernel.attend(q, k[:70], v[:70], is_causal=False)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.usefixtures("one_thread")
def test_a_row_depends_on_itself_alone(kernel: NativeAttention) -> None:
    """Not on the rows beside it, nor on the number of threads."""
    q, k, v = piece(400, 400, (4, 2, 64))
    out, lse = kernel.attend(q, k, v, is_causal=False)
    for first, last in ((0, 17), (5, 200), (191, 400)):
        part, part_lse = kernel.attend(q[first:last], k, v, is_causal=False)
        assert torch.equal(part, out[first:last]) and torch.equal(part_lse, lse[first:last])
    torch.set_num_threads(3)
    again, again_lse = kernel.attend(q, k, v, is_causal=False)
    assert torch.equal(again, out) and torch.equal(again_lse, lse)


@pytest.mark.parametrize(
    ("num_queries", "head_dim", "dtype"),
    [(MIN_ROWS - 1, 64, BF16), (100, 20, BF16), (100, 64, torch.float32)],
)
def test_what_it_leaves_to_others(
    kernel: NativeAttention, num_queries: int, head_dim: int, dtype: torch.dtype
) -> None:
    q = make(num_queries, 2, head_dim, dtype=dtype)
    k = make(40, 2, head_dim, dtype=dtype)
    assert not kernel.takes(q, k)
