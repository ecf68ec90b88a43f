"""The CPU kernel against dense attention in fp64."""

import itertools
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.kernels.attention import AttentionKernel, Piece
from modeling.kernels.cpu_attention import CpuKernel
from tests.sizes import some_of

# Relative error of torch's own flash op against fp64, with some room.
OUT_ERROR = {torch.float32: 1.5e-6, torch.bfloat16: 4e-3}
LSE_ERROR = {torch.float32: 5e-6, torch.bfloat16: 2e-4}
DTYPES = list(OUT_ERROR)
SHAPES = [(8, 2, 64), (4, 4, 32), (6, 3, 80), (7, 1, 128), (2, 1, 20)]  # N, K, H


@pytest.fixture(scope="module")
def kernel() -> CpuKernel:
    return CpuKernel()


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible_TS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in fp64; a row that sees nothing gives 0 and -inf."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("tnh,snh->nts", q.double(), k) / q.shape[2] ** 0.5
    scores.masked_fill_(~visible_TS, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("nts,snh->tnh", weights, v), lse.T


def visible(piece: Piece, num_queries: int) -> torch.Tensor:
    distance = torch.arange(piece.q_start, piece.q_start + num_queries)[:, None] - piece.k_positions
    return (distance >= 0) & (distance < (piece.window or 2**40))


def make(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor]) -> None:
    (out, lse), (want_out, want_lse) = got, want
    assert out.shape == want_out.shape and lse.shape == want_lse.shape
    assert lse.dtype == torch.float32
    assert torch.equal(torch.isneginf(lse), torch.isneginf(want_lse))
    seen = torch.isfinite(want_lse)
    assert (out.double()[~seen] == 0).all()
    assert (out - want_out).norm() <= OUT_ERROR[out.dtype] * max(1e-9, float(want_out.norm()))
    assert ((lse - want_lse)[seen].abs() <= LSE_ERROR[out.dtype]).all()


def attend_and_check(
    kernel: AttentionKernel, piece: Piece, num_queries: int, shape: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    num_heads, num_kv_heads, head_dim = shape
    q = make(num_queries, num_heads, head_dim, dtype=dtype)
    k = make(len(piece.k_positions), num_kv_heads, head_dim, dtype=dtype, seed=1)
    v = make(len(piece.k_positions), num_kv_heads, head_dim, dtype=dtype, seed=2)
    check(kernel.attend(q, k, v, piece), dense(q, k, v, visible(piece, num_queries)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 33, 300])
def test_causal_square(
    kernel: CpuKernel, num_tokens: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    piece = Piece(True, 7, torch.arange(7, 7 + num_tokens))
    attend_and_check(kernel, piece, num_tokens, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 600), (65, 3), (40, 257)])
def test_keys_before_the_queries(
    kernel: CpuKernel, num_queries: int, num_keys: int, dtype: torch.dtype
) -> None:
    piece = Piece(False, 1000, torch.arange(1000 - num_keys, 1000))
    attend_and_check(kernel, piece, num_queries, (8, 2, 64), dtype)


@settings(max_examples=some_of(40))
@given(st.data())
def test_windows(kernel: CpuKernel, data: st.DataObject) -> None:
    num_queries = data.draw(st.integers(1, 600))
    window = data.draw(st.integers(1, 700))
    q_start = data.draw(st.integers(1, 500))
    if data.draw(st.booleans()):
        piece = Piece(True, q_start, torch.arange(q_start, q_start + num_queries), window)
    else:  # any keys before the queries, with gaps, as a rank of a ring holds them
        keys = data.draw(st.sets(st.integers(0, q_start - 1), min_size=1, max_size=200))
        piece = Piece(False, q_start, torch.tensor(sorted(keys)), window)
    attend_and_check(kernel, piece, num_queries, (2, 1, 32), torch.float32)


def test_strided_inputs_are_fine(kernel: CpuKernel) -> None:
    """q, k and v as slices of one packed projection, k and v as slices of a gathered scratch."""
    qkv = make(50, 12, 64, dtype=torch.float32)
    q, k, v = qkv[:, :8], qkv[:, 8:10], qkv[:, 10:]
    piece = Piece(True, 0, torch.arange(50))
    want = dense(q, k, v, visible(piece, 50))
    check(kernel.attend(q, k, v, piece), want)
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    check(kernel.attend(q, k, v, piece), want)


@settings(max_examples=some_of(60))
@given(
    num_keys=st.integers(1, 60),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    dtype=st.sampled_from(DTYPES),
)
def test_any_split_of_the_keys_merges_to_the_whole(
    kernel: CpuKernel, num_keys: int, cuts: list[int], dtype: torch.dtype
) -> None:
    q = make(9, 4, 32, dtype=dtype)
    k, v = (make(num_keys, 2, 32, dtype=dtype, seed=seed) for seed in (1, 2))
    edges = sorted({0, num_keys, *(cut for cut in cuts if cut < num_keys)})
    out, lse = torch.zeros(9, 4, 32), torch.full((9, 4), -torch.inf)
    for start, end in itertools.pairwise(edges):
        piece = Piece(False, 100, torch.arange(start, end))
        kernel.merge_(out, lse, *kernel.attend(q, k[start:end], v[start:end], piece))
    want_out, want_lse = dense(q, k, v, torch.ones(9, num_keys, dtype=torch.bool))
    check((out.to(dtype), lse), (want_out, want_lse))


def test_merging_rows_that_saw_nothing(kernel: CpuKernel) -> None:
    none, some = -torch.inf, 0.5
    out = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)
    lse = torch.tensor([none, none, some, some]).view(4, 1)
    other = torch.tensor([5.0, 6.0, 7.0, 8.0]).view(4, 1, 1)
    other_lse = torch.tensor([none, some, none, some]).view(4, 1)
    kernel.merge_(out, lse, other, other_lse)
    assert out.flatten().tolist() == [1.0, 6.0, 3.0, 6.0]
    assert lse.flatten()[:3].tolist() == [none, some, some]


# -- paged decode ----------------------------------------------------------------------------------


def paged_case(
    shape: tuple[int, int, int], lengths: list[int], block_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_heads, num_kv_heads, head_dim = shape
    max_blocks = -(-max(lengths) // block_size)
    num_blocks = len(lengths) * max_blocks + 2
    pool = make(num_blocks, num_kv_heads, 2, block_size, head_dim, dtype=dtype)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3))
    tables = order[: len(lengths) * max_blocks].view(len(lengths), -1).int()
    for row, length in zip(tables, lengths, strict=True):
        row[-(-length // block_size) :] = -1  # whoever reads past the end dies of it
    q = make(len(lengths), num_heads, head_dim, dtype=dtype, seed=4)
    return q, pool, tables, torch.tensor(lengths, dtype=torch.int32)


def dense_paged(
    q: torch.Tensor, pool: torch.Tensor, tables: torch.Tensor, lens: torch.Tensor,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    results = []
    for q_NH, row, length in zip(q, tables, lens.tolist(), strict=True):
        blocks = pool[row[row >= 0].long()]
        k, v = blocks.permute(2, 0, 3, 1, 4).flatten(1, 2)[:, :length]
        piece = Piece(False, length - 1, torch.arange(length), window)
        results.append(dense(q_NH[None], k, v, visible(piece, 1)))
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs), torch.cat(lses)


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("block_size", "window"), [(32, None), (24, 50), (1, 130), (32, 1)])
def test_paged_decode(
    native: bool,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    block_size: int,
    window: int | None,
) -> None:
    kernel = CpuKernel(native=native)
    case = paged_case(shape, [1, 2, 31, 32, 33, 127, 128, 129, 300], block_size, dtype)
    check(kernel.paged_decode(*case, window=window), dense_paged(*case, window))


@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_decode_does_not_depend_on_the_batch(kernel: CpuKernel, dtype: torch.dtype) -> None:
    q, pool, tables, lens = paged_case((8, 2, 64), [5, 900, 130, 64], 32, dtype)
    out, lse = kernel.paged_decode(q, pool, tables, lens)
    for i in range(4):
        alone = slice(i, i + 1)
        own_out, own_lse = kernel.paged_decode(q[alone], pool, tables[alone], lens[alone])
        assert torch.equal(own_out, out[alone]) and torch.equal(own_lse, lse[alone])


def test_paged_decode_with_several_threads(kernel: CpuKernel) -> None:
    q, pool, tables, lens = paged_case((8, 2, 64), [6000, 2000, 5000], 32, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            results.append(kernel.paged_decode(q, pool, tables, lens))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_paged_decode_of_a_strided_query(kernel: CpuKernel) -> None:
    _, pool, tables, lens = paged_case((8, 2, 64), [40, 70], 32, torch.bfloat16)
    q = make(2, 12, 64, dtype=torch.bfloat16)[:, :8]
    check(kernel.paged_decode(q, pool, tables, lens), dense_paged(q, pool, tables, lens, None))


@pytest.mark.parametrize(("block_id", "length"), [(-1, 40), (99, 40), (0, 0), (0, 65)])
def test_paged_decode_refuses_what_lies_outside(
    kernel: CpuKernel, block_id: int, length: int
) -> None:
    if not kernel.is_native:
        pytest.skip("no C++ compiler here")
    q, pool, tables, lens = paged_case((2, 1, 32), [64], 32, torch.float32)
    tables[0, 1], lens[0] = block_id, length
    with pytest.raises(AssertionError, match="outside its range"):
        kernel.paged_decode(q, pool, tables, lens)


# -- the build -------------------------------------------------------------------------------------


def test_each_library_is_compiled_once(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    if not CpuKernel(folder).is_native:
        pytest.skip("no C++ compiler here")
    built = {library: library.stat().st_mtime_ns for library in folder.glob("*.so")}
    assert {library.name.split("-")[0] for library in built} == {"paged_decode", "attention"}
    assert CpuKernel(folder).is_native
    assert built == {library: library.stat().st_mtime_ns for library in folder.glob("*.so")}
    assert not list(folder.glob("tmp*")), "the compiler's scratch folder stays behind"


def test_a_cache_that_others_may_write_to_is_not_trusted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        kernel = CpuKernel(folder)
    assert not kernel.is_native
    assert "other users" in caplog.text or "no C++ compiler" in caplog.text
