"""What the kernels of both devices share: merging partials, and sliding windows in tiles."""

from typing import Protocol

import torch

from modeling.kernels.attention import Piece

WINDOW_TILE = 256  # queries of one call when a window cuts


class MaskedAttention(Protocol):
    """Attention under an additive mask of q's dtype; no row of it is all -inf."""

    def __call__(
        self, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, mask_TS: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


def merge_(
    out_TNH: torch.Tensor,
    lse_TN: torch.Tensor,
    other_out_TNH: torch.Tensor,
    other_lse_TN: torch.Tensor,
) -> None:
    """Merge a partial into ``(out, lse)`` in place; both fp32, on any device.

    Rows of either side may have seen nothing (lse -inf, any finite out). With the accumulator in
    the kernels' own layout this is a third of the cost of the formula taken literally.
    """
    assert out_TNH.dtype == lse_TN.dtype == torch.float32
    weight_TN = torch.sigmoid(other_lse_TN - lse_TN)
    # -inf on both sides makes a NaN here; the other side's -inf alone makes the 0 that it is.
    weight_TN.masked_fill_(torch.isneginf(other_lse_TN), 0.0)
    out_TNH.lerp_(other_out_TNH.float(), weight_TN.unsqueeze(-1))
    torch.logaddexp(lse_TN, other_lse_TN, out=lse_TN)


def window_cuts(piece: Piece, num_queries: int) -> bool:
    """Whether the window hides a key from a query that would see it otherwise."""
    last_query = piece.q_start + num_queries - 1
    return piece.window is not None and last_query - int(piece.k_positions[0]) >= piece.window


def attend_windowed(
    q_TNH: torch.Tensor,
    k_SKH: torch.Tensor,
    v_SKH: torch.Tensor,
    piece: Piece,
    attend: MaskedAttention,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention under a window that cuts: tiles of queries, each over the keys that it can see.

    Queries past the window's reach are left out: they get 0 and -inf.
    """
    assert piece.window is not None
    num_queries = q_TNH.shape[0]
    window = piece.window
    k_positions = piece.k_positions
    out_TNH = torch.zeros(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    lse_TN = torch.full(q_TNH.shape[:2], -torch.inf, device=q_TNH.device)
    blind = int(k_positions[-1]) + window - piece.q_start  # from this query on: no key in reach
    for start in range(0, min(num_queries, blind), WINDOW_TILE):
        end = min(start + WINDOW_TILE, num_queries, blind)
        q_positions = torch.arange(piece.q_start + start, piece.q_start + end)
        # From the first key that the first query sees to the last one that the last query sees.
        first = int(torch.searchsorted(k_positions, q_positions[0] - window, right=True))
        last = int(torch.searchsorted(k_positions, q_positions[-1], right=True))
        distance_TS = q_positions.unsqueeze(1) - k_positions[first:last]
        hidden_TS = (distance_TS < 0) | (distance_TS >= window)
        mask_TS = torch.zeros(hidden_TS.shape, dtype=q_TNH.dtype).masked_fill_(
            hidden_TS, -torch.inf
        )
        out_TNH[start:end], lse_TN[start:end] = attend(
            q_TNH[start:end], k_SKH[first:last], v_SKH[first:last], mask_TS.to(q_TNH.device)
        )
    return out_TNH, lse_TN
