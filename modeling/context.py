"""What a layer needs from its surroundings: where KV lies and how attention reaches it.

Shape suffixes, here and in every file of modeling: T tokens, S keys, N query heads of this rank,
K KV heads of this rank, H head_dim, D hidden size, V vocabulary, B sequences.
"""

from abc import ABC, abstractmethod

import torch


class AttentionContext(ABC):
    """One forward pass over one batch: the model calls it once for each layer, in order.

    The context, not the model, knows whether KV is paged, sharded over a ring, or both.
    """

    @abstractmethod
    def attend(
        self, layer: int, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor
    ) -> torch.Tensor:
        """Store K and V of the batch's tokens, then attend causally to all that each may see.

        Args:
            layer: index from 0.
            q_TNH, k_TKH, v_TKH: of this rank's tokens and heads, RoPE applied, last stride 1.

        Returns:
            out_TNH in q's dtype. The caller may reuse q, k and v when this returns.
        """

    def layer_done(self, layer: int) -> None:  # noqa: B027 - most contexts do not care
        """The model has finished with ``layer``; its KV is final. Does not block."""
