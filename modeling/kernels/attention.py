"""Attention on one device behind one interface.

A *partial* is ``(out, lse)`` of a query over some of its keys: out_TNH in fp32 or the input dtype,
lse_TN in fp32, natural logarithm, scale included, -inf for a row that saw no key. Two partials of
disjoint keys merge exactly (Milakov and Gimelshein, arXiv 1805.02867):

    lse = logaddexp(lse1, lse2);  out = out1 + sigmoid(lse2 - lse1) * (out2 - out1)
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Piece:
    """Where the queries and keys of one kernel call lie in their sequence.

    ``causal`` False: every key precedes every query. True: the keys are at the queries' own
    positions (T == S, the diagonal square). Nothing in between is ever passed.
    """

    causal: bool
    q_start: int  # position of the first query
    k_positions: torch.Tensor  # int64 [S], ascending, on CPU
    window: int | None = None  # a query at ``p`` sees keys at positions above ``p - window``


class AttentionKernel(ABC):
    """One device's attention. Calls are synchronous on CPU and stream-ordered on CUDA.

    No method is ever called with an empty tensor: the CPU op dies of it (SIGFPE), so callers leave
    empty pieces out.
    """

    @abstractmethod
    def attend(
        self,
        q_TNH: torch.Tensor,
        k_SKH: torch.Tensor,
        v_SKH: torch.Tensor,
        piece: Piece,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Partial attention of consecutive queries over some keys.

        Args:
            q_TNH: queries at positions ``piece.q_start + arange(T)``.
            k_SKH, v_SKH: keys and values; N is a multiple of K (GQA). Last stride is 1.
            piece: where queries and keys lie in the sequence.

        Returns:
            (out_TNH, lse_TN).
        """

    @abstractmethod
    def merge_(
        self,
        out_TNH: torch.Tensor,
        lse_TN: torch.Tensor,
        other_out_TNH: torch.Tensor,
        other_lse_TN: torch.Tensor,
    ) -> None:
        """Merge ``other`` into ``(out, lse)`` in place; ``out`` is fp32, -inf rows are allowed."""

    @abstractmethod
    def paged_decode(
        self,
        q_BNH: torch.Tensor,
        pool: torch.Tensor,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        *,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One query per sequence over its paged KV, each sequence alone in a fixed order.

        Args:
            q_BNH: the query of each sequence, at position ``context_lens[b] - 1``.
            pool: one layer of the KV pool, [num_blocks, K, 2, block_size, H].
            block_tables: int32 [B, max_blocks] on CPU or the device; entries past the end unused.
            context_lens: int32 [B], keys of each sequence, the query's own included; at least 1.

        Returns:
            (out_BNH in q's dtype, lse_BN).
        """
