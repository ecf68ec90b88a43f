"""Attention on NVIDIA GPUs: flash attention for pieces, our own Triton kernel for paged decode.

``attend`` takes the package flash_attn where it is installed and otherwise the flash forward that
torch bundles; both align causal masks and windows to the bottom right. float32, which neither has,
and a window over keys that come before the queries go through plain matrix products in fp32.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from modeling.kernels.attention import AttentionKernel, Piece
from modeling.kernels.partials import attend_windowed, merge_, window_cuts

_MATH_TILE = 256  # queries of one product: bounds the memory for scores

_Partial = tuple[torch.Tensor, torch.Tensor]


class CudaKernel(AttentionKernel):
    """The kernel of CUDA ranks; stream-ordered, nothing waits for the host."""

    def __init__(self) -> None:
        self._flash: Callable[..., _Partial] = _torch_flash
        if importlib.util.find_spec("flash_attn") is not None:
            self._flash = _FlashAttn()

    def attend(
        self, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, piece: Piece
    ) -> _Partial:
        assert q_TNH.stride(2) == k_SKH.stride(2) == v_SKH.stride(2) == 1
        cuts = window_cuts(piece, len(q_TNH))
        has_flash = q_TNH.dtype in (torch.bfloat16, torch.float16)
        if has_flash and (piece.causal or not cuts):
            window = piece.window if cuts else None
            return self._flash(q_TNH, k_SKH, v_SKH, piece.causal, window)
        if cuts:
            return attend_windowed(q_TNH, k_SKH, v_SKH, piece, masked_attention)
        return _math(q_TNH, k_SKH, v_SKH, piece.causal)

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
    ) -> _Partial:
        from modeling.kernels.triton_decode import paged_decode  # Triton is there only with CUDA

        device = q_BNH.device
        return paged_decode(q_BNH, pool, block_tables.to(device), context_lens.to(device), window)


class _FlashAttn:
    """The package flash_attn, 2.8 or later."""

    def __init__(self) -> None:
        module: Any = importlib.import_module("flash_attn")
        self._attend = module.flash_attn_func

    def __call__(
        self,
        q_TNH: torch.Tensor,
        k_SKH: torch.Tensor,
        v_SKH: torch.Tensor,
        causal: bool,
        window: int | None,
    ) -> _Partial:
        out_1TNH, lse_1NT, _ = self._attend(
            q_TNH.unsqueeze(0),
            k_SKH.unsqueeze(0),
            v_SKH.unsqueeze(0),
            causal=causal,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            return_attn_probs=True,
        )
        return out_1TNH.squeeze(0), lse_1NT.squeeze(0).transpose(0, 1)


def _torch_flash(
    q_TNH: torch.Tensor,
    k_SKH: torch.Tensor,
    v_SKH: torch.Tensor,
    causal: bool,
    window: int | None,
) -> _Partial:
    """torch's own op in its form for sequences of unequal length, of which there is one."""
    ends = torch.tensor([[0, len(q_TNH)], [0, len(k_SKH)]], dtype=torch.int32)
    q_ends, k_ends = ends.to(q_TNH.device, non_blocking=True).unbind(0)
    limits = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    out_TNH, lse_NT = torch.ops.aten._flash_attention_forward(
        q_TNH,
        k_SKH,
        v_SKH,
        q_ends,
        k_ends,
        len(q_TNH),
        len(k_SKH),
        0.0,
        causal,
        False,
        **limits,
    )[:2]
    return out_TNH, lse_NT.transpose(0, 1)


def _math(q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, causal: bool) -> _Partial:
    outs = []
    lses = []
    for start in range(0, len(q_TNH), _MATH_TILE):
        q_tile_TNH = q_TNH[start : start + _MATH_TILE]
        end = start + len(q_tile_TNH) if causal else len(k_SKH)
        mask_TS = torch.zeros((len(q_tile_TNH), end), device=q_TNH.device)
        if causal:
            ones = torch.ones_like(mask_TS, dtype=torch.bool)
            mask_TS.masked_fill_(ones.triu_(start + 1), -torch.inf)
        out, lse = masked_attention(q_tile_TNH, k_SKH[:end], v_SKH[:end], mask_TS)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def masked_attention(
    q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, mask_TS: torch.Tensor
) -> _Partial:
    """Attention by plain matrix products in fp32, on any device."""
    num_queries, num_heads, head_dim = q_TNH.shape
    num_kv_heads = k_SKH.shape[1]
    q_TKGH = q_TNH.float().view(num_queries, num_kv_heads, -1, head_dim) * head_dim**-0.5
    scores_KGTS = torch.einsum("tkgh,skh->kgts", q_TKGH, k_SKH.float()) + mask_TS.float()
    lse_KGT = scores_KGTS.logsumexp(-1)
    weights_KGTS = (scores_KGTS - lse_KGT.unsqueeze(-1)).exp_()
    out_TKGH = torch.einsum("kgts,skh->tkgh", weights_KGTS, v_SKH.float())
    out_TNH = out_TKGH.reshape(num_queries, num_heads, head_dim).to(q_TNH.dtype)
    return out_TNH, lse_KGT.flatten(0, 1).transpose(0, 1)
