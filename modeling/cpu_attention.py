"""Attention on CPU: torch's flash op for pieces, our own C++ kernel for paged decode.

``attend``: a sliding window that really cuts is worked off in tiles of queries, each over the keys
that it can see; a tile never has a row that sees nothing. The flash op has traps that decide how it
is called: an empty input kills the process, a last stride other than 1 gives wrong numbers, and a
row that is masked out altogether comes back with lse 0 instead of -inf.

``paged_decode``: each sequence alone, its keys in order of position, so what it computes does not
depend on the rest of the batch.
"""

import ctypes
from pathlib import Path

import torch

from modeling.attention import AttentionKernel, Piece
from modeling.native import load_native

WINDOW_TILE = 256  # queries of one call when a window cuts
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class CpuKernel(AttentionKernel):
    """The kernel of CPU ranks; float32 and bfloat16.

    Args:
        cache_dir: of the compiled library; None is the user's.
        native: False takes the torch path of ``paged_decode`` even where C++ could be compiled.
    """

    def __init__(self, cache_dir: Path | None = None, *, native: bool = True) -> None:
        self._library = load_native("paged_decode", cache_dir) if native else None
        if self._library is not None:
            self._library.paged_decode.argtypes = (ctypes.POINTER(_PagedDecodeArgs),)

    @property
    def is_native(self) -> bool:
        """Whether ``paged_decode`` runs in C++."""
        return self._library is not None

    def attend(
        self, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, piece: Piece
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert q_TNH.stride(2) == k_SKH.stride(2) == v_SKH.stride(2) == 1
        if piece.window is not None:
            last_query = piece.q_start + q_TNH.shape[0] - 1
            if last_query - int(piece.k_positions[0]) >= piece.window:
                return _attend_windowed(q_TNH, k_SKH, v_SKH, piece, piece.window)
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
    """Mirrors the struct of native/paged_decode.cpp."""

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


def merge_(
    out_TNH: torch.Tensor,
    lse_TN: torch.Tensor,
    other_out_TNH: torch.Tensor,
    other_lse_TN: torch.Tensor,
) -> None:
    """Merge a partial into ``(out, lse)`` in place; both fp32, on any device.

    Rows of either side may have seen nothing (lse -inf, any finite out).
    """
    assert out_TNH.dtype == lse_TN.dtype == torch.float32
    weight_TN = torch.sigmoid(other_lse_TN - lse_TN)
    # -inf on both sides makes a NaN here; the other side's -inf alone makes the 0 that it is.
    weight_TN.masked_fill_(torch.isneginf(other_lse_TN), 0.0)
    out_TNH.lerp_(other_out_TNH.float(), weight_TN.unsqueeze(-1))
    torch.logaddexp(lse_TN, other_lse_TN, out=lse_TN)


def _attend(
    q_TNH: torch.Tensor,
    k_SKH: torch.Tensor,
    v_SKH: torch.Tensor,
    *,
    is_causal: bool = False,
    mask_TS: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    # [T, N, H] seen as (1, N, T, H): the op gives its output the same strides, and lse as [1, T, N].
    out_1NTH, lse_1NT = _flash(
        q_TNH.transpose(0, 1).unsqueeze(0),
        k_SKH.transpose(0, 1).unsqueeze(0),
        v_SKH.transpose(0, 1).unsqueeze(0),
        0.0,
        is_causal,
        attn_mask=mask_TS,
    )
    return out_1NTH.squeeze(0).transpose(0, 1), lse_1NT.squeeze(0).transpose(0, 1)


def _attend_windowed(
    q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, piece: Piece, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    num_queries, k_positions = q_TNH.shape[0], piece.k_positions
    out_TNH = torch.zeros(q_TNH.shape, dtype=q_TNH.dtype)
    lse_TN = torch.full(q_TNH.shape[:2], -torch.inf)
    # Queries from this one on see none of the keys.
    blind = int(k_positions[-1]) + window - piece.q_start
    for start in range(0, min(num_queries, blind), WINDOW_TILE):
        end = min(start + WINDOW_TILE, num_queries, blind)
        q_positions = torch.arange(piece.q_start + start, piece.q_start + end)
        # Keys that the first query sees at the earliest, and the last query at the latest.
        first = int(torch.searchsorted(k_positions, q_positions[0] - window, right=True))
        last = int(torch.searchsorted(k_positions, q_positions[-1], right=True))
        distance_TS = q_positions.unsqueeze(1) - k_positions[first:last]
        hidden_TS = (distance_TS < 0) | (distance_TS >= window)
        mask_TS = torch.zeros(hidden_TS.shape, dtype=q_TNH.dtype)
        mask_TS.masked_fill_(hidden_TS, -torch.inf)
        out_TNH[start:end], lse_TN[start:end] = _attend(
            q_TNH[start:end], k_SKH[first:last], v_SKH[first:last], mask_TS=mask_TS
        )
    return out_TNH, lse_TN


def _paged_decode_torch(
    q_BNH: torch.Tensor,
    pool: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Without a compiler: gather each sequence and call the flash op."""
    block_size = pool.shape[3]
    outs, lses = [], []
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
