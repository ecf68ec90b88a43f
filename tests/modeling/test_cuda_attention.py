"""The GPU kernel against the CPU one; what it does in plain products is checked without a GPU."""

import pytest
import torch

from modeling.kernels.attention import Piece
from modeling.kernels.cpu_attention import CpuKernel
from modeling.kernels.cuda_attention import CudaKernel, masked_attention

ERROR = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def make(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor]) -> None:
    out, lse = (x.cpu().float() for x in got)
    want_out, want_lse = (x.float() for x in want)
    error = ERROR[got[0].dtype]
    assert (out - want_out).norm() <= error * want_out.norm()
    assert torch.equal(torch.isneginf(lse), torch.isneginf(want_lse))
    torch.testing.assert_close(lse, want_lse, rtol=error, atol=error)


PIECES = [
    Piece(True, 5, torch.arange(5, 305)),
    Piece(True, 5, torch.arange(5, 305), 40),
    Piece(False, 400, torch.arange(100, 400)),
    Piece(False, 400, torch.arange(100, 400), 1000),
    Piece(False, 400, torch.arange(100, 400), 120),  # the later of 300 queries see nothing
    Piece(False, 400, torch.arange(0, 400, 7), 90),
]
PIECE_NAMES = [
    *("square", "square in a window", "prefix", "prefix in a wide window"),
    *("prefix in a window", "scattered keys in a window"),
]


@pytest.mark.parametrize("piece", PIECES, ids=PIECE_NAMES)
def test_float32_pieces_are_plain_products(piece: Piece) -> None:
    """On any device, so here too: flash attention has no float32."""
    num_keys = len(piece.k_positions)
    q = make(300, 8, 64, dtype=torch.float32)
    k, v = (make(num_keys, 2, 64, dtype=torch.float32, seed=seed) for seed in (1, 2))
    check(CudaKernel().attend(q, k, v, piece), CpuKernel().attend(q, k, v, piece))


def test_masked_attention_of_bfloat16() -> None:
    q, k, v = (make(40, h, 64, dtype=torch.bfloat16, seed=h) for h in (8, 2, 2))
    mask = torch.zeros(40, 40).masked_fill_(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    want = CpuKernel().attend(q, k, v, Piece(True, 0, torch.arange(40)))
    check(masked_attention(q, k, v, mask), want)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("piece", PIECES, ids=PIECE_NAMES)
@pytest.mark.parametrize("shape", [(8, 2, 64), (16, 8, 128)])
def test_attend_on_gpu(piece: Piece, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    num_heads, num_kv_heads, head_dim = shape
    q = make(300, num_heads, head_dim, dtype=dtype)
    k, v = (
        make(len(piece.k_positions), num_kv_heads, head_dim, dtype=dtype, seed=s) for s in (1, 2)
    )
    got = CudaKernel().attend(q.cuda(), k.cuda(), v.cuda(), piece)
    check(got, CpuKernel().attend(q, k, v, piece))


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(8, 2, 64), (16, 8, 128), (7, 1, 80)])
@pytest.mark.parametrize("window", [None, 100, 700])
def test_paged_decode_on_gpu(
    dtype: torch.dtype, shape: tuple[int, int, int], window: int | None
) -> None:
    num_heads, num_kv_heads, head_dim = shape
    lens = torch.tensor([1, 31, 32, 511, 512, 513, 1500], dtype=torch.int32)
    tables = torch.randperm(7 * 47).view(7, 47).int()
    pool = make(7 * 47, num_kv_heads, 2, 32, head_dim, dtype=dtype)
    q = make(7, num_heads, head_dim, dtype=dtype, seed=1)
    kernel = CudaKernel()
    got = kernel.paged_decode(q.cuda(), pool.cuda(), tables, lens, window=window)
    check(got, CpuKernel().paged_decode(q, pool, tables, lens, window=window))
    alone = kernel.paged_decode(
        q[5:6].cuda(), pool.cuda(), tables[5:6, :17], lens[5:6], window=window
    )
    assert torch.equal(alone[0], got[0][5:6]), "the batch changed a sequence's bits"


@gpu
@needs_gpu
def test_merge_on_gpu() -> None:
    outs = [make(9, 4, 64, dtype=torch.float32, seed=s) for s in (1, 2)]
    lses = [make(9, 4, dtype=torch.float32, seed=s) for s in (3, 4)]
    lses[0][:3], lses[1][2:5] = -torch.inf, -torch.inf
    out, lse = outs[0].clone().cuda(), lses[0].clone().cuda()
    CudaKernel().merge_(out, lse, outs[1].cuda(), lses[1].cuda())
    CpuKernel().merge_(outs[0], lses[0], outs[1], lses[1])
    check((out, lse), (outs[0], lses[0]))
