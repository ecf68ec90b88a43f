"""Attention on CPU: for pieces torch's flash op, or a C++ kernel in bf16; for paged decode another.

``attend``: the flash op has traps that decide how it is called. An empty input kills the process, a
last stride other than 1 gives wrong numbers, and a row that is masked out altogether comes back
with lse 0 instead of -inf, so callers leave such rows out.

``paged_decode``: each sequence alone, its keys in order of position, so what it computes does not
depend on the rest of the batch.
"""

import ctypes
from pathlib import Path

import torch

from modeling.kernels.attention import AttentionKernel, Piece
from modeling.kernels.native_attention import NativeAttention
from modeling.kernels.native_build import load_native
from modeling.kernels.partials import attend_windowed, merge_, window_cuts

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class CpuKernel(AttentionKernel):
    """The kernel of CPU ranks; float32 and bfloat16.

    Args:
        cache_dir: of the compiled library; None is the user's.
        native: False takes the torch paths even where C++ could be compiled.
    """

    def __init__(self, cache_dir: Path | None = None, *, native: bool = True) -> None:
        self._library = load_native("paged_decode", cache_dir) if native else None
        if self._library is not None:
            self._library.paged_decode.argtypes = (ctypes.POINTER(_PagedDecodeArgs),)
        self._attention = NativeAttention(cache_dir) if native else None

    @property
    def is_native(self) -> bool:
        """Whether ``paged_decode`` runs in C++."""
        return self._library is not None

    @property
    def has_fast_bfloat16(self) -> bool:
        """Whether it does so with the CPU's bf16 instructions."""
        return self._library is not None and bool(self._library.has_fast_bfloat16())

    def attend(
        self, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, piece: Piece
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert q_TNH.stride(2) == k_SKH.stride(2) == v_SKH.stride(2) == 1
        assert len(q_TNH) and len(k_SKH), "the op dies of an empty piece"
        if window_cuts(piece, len(q_TNH)):
            return attend_windowed(q_TNH, k_SKH, v_SKH, piece, _attend)
        if self._attention is not None and self._attention.takes(q_TNH, k_SKH):
            return self._attention.attend(q_TNH, k_SKH, v_SKH, is_causal=piece.causal)
        return _attend(q_TNH, k_SKH, v_SKH, is_causal=piece.causal)

    def merge_(
        self,
        out_TNH: torch.Tensor,
        lse_TN: torch.Tensor,
        other_out_TNH: torch.Tensor,
        other_lse_TN: torch.Tensor,
    ) -> None:
        merge_(out_TNH, lse_TN, other_out_TNH, other_lse_TN)

    def paged_decode(
        self,
        q_BNH: torch.Tensor,
        pool: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        *,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._library is None or q_BNH.dtype not in (torch.float32, torch.bfloat16):
            return _paged_decode_torch(q_BNH, pool, block_tables, context_lens, window)
        num_seqs, num_heads, head_dim = q_BNH.shape
        num_blocks, num_kv_heads, _, block_size, _ = pool.shape
        assert q_BNH.stride(2) == pool.stride(4) == block_tables.stride(1) == 1
        assert pool.stride(3) == head_dim and q_BNH.dtype == pool.dtype
        assert block_tables.dtype == context_lens.dtype == torch.int32
        assert len(block_tables) == len(context_lens) == num_seqs and context_lens.is_contiguous()
        out_BNH = torch.empty((num_seqs, num_heads, head_dim), dtype=q_BNH.dtype)
        lse_BN = torch.empty((num_seqs, num_heads), dtype=torch.float32)
        args = _PagedDecodeArgs(
            q=q_BNH.data_ptr(),
            pool=pool.data_ptr(),
            out=out_BNH.data_ptr(),
            lse=lse_BN.data_ptr(),
            block_tables=block_tables.data_ptr(),
            context_lens=context_lens.data_ptr(),
            num_seqs=num_seqs,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            num_blocks=num_blocks,
            q_seq_stride=q_BNH.stride(0),
            q_head_stride=q_BNH.stride(1),
            table_stride=block_tables.stride(0),
            max_blocks=block_tables.shape[1],
            block_stride=pool.stride(0),
            head_stride=pool.stride(1),
            value_offset=pool.stride(2),
            window=window or 0,
            is_bfloat16=q_BNH.dtype == torch.bfloat16,
            num_threads=torch.get_num_threads(),
            scale=head_dim**-0.5,
        )
        code = self._library.paged_decode(ctypes.byref(args))
        assert code == 0, "a context length or block id is outside its range"
        return out_BNH, lse_BN


class _PagedDecodeArgs(ctypes.Structure):
    """Mirrors the struct of cpp/paged_decode.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "pool", "out", "lse")),
        *((name, ctypes.c_void_p) for name in ("block_tables", "context_lens")),
        *((name, ctypes.c_int64) for name in ("num_seqs", "num_heads", "num_kv_heads")),
        *((name, ctypes.c_int64) for name in ("head_dim", "block_size", "num_blocks")),
        *((name, ctypes.c_int64) for name in ("q_seq_stride", "q_head_stride")),
        *((name, ctypes.c_int64) for name in ("table_stride", "max_blocks")),
        *((name, ctypes.c_int64) for name in ("block_stride", "head_stride", "value_offset")),
        *((name, ctypes.c_int64) for name in ("window", "is_bfloat16", "num_threads")),
        ("scale", ctypes.c_double),
    )


def _attend(
    q_TNH: torch.Tensor,
    k_SKH: torch.Tensor,
    v_SKH: torch.Tensor,
    mask_TS: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    # [T, N, H] seen as (1, N, T, H): the op's output has the same strides, its lse is [1, T, N].
    out_1NTH, lse_1NT = _flash(
        q_TNH.transpose(0, 1).unsqueeze(0),
        k_SKH.transpose(0, 1).unsqueeze(0),
        v_SKH.transpose(0, 1).unsqueeze(0),
        0.0,
        is_causal,
        attn_mask=mask_TS,
    )
    return out_1NTH.squeeze(0).transpose(0, 1), lse_1NT.squeeze(0).transpose(0, 1)


def _paged_decode_torch(
    q_BNH: torch.Tensor,
    pool: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Without a compiler: gather each sequence and call the flash op."""
    block_size = pool.shape[3]
    outs = []
    lses = []
    for q_NH, table, length in zip(q_BNH, block_tables, context_lens.tolist(), strict=True):
        assert length >= 1, "a sequence without keys"
        first = max(0, length - window) if window else 0
        skipped = first // block_size
        blocks = pool[table[skipped : -(-length // block_size)].long()]  # [n, K, 2, block_size, H]
        kv_2SKH = blocks.permute(2, 1, 0, 3, 4).flatten(2, 3).transpose(1, 2)
        start, end = first - skipped * block_size, length - skipped * block_size
        out, lse = _attend(q_NH.unsqueeze(0), kv_2SKH[0, start:end], kv_2SKH[1, start:end])
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)
