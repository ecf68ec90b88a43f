"""What every served model can do; the transformer and the arithmetic model both are one."""

from abc import ABC, abstractmethod

import torch

from modeling.attention import AttentionKernel
from modeling.config import ModelConfig
from modeling.context import AttentionContext


class Model(ABC):
    """A decoder-only model, or one tensor-parallel shard of it.

    Every rank of a tensor-parallel group calls the same methods in the same order.
    """

    config: ModelConfig
    kernel: AttentionKernel
    dtype: torch.dtype  # of activations and of the KV pool
    device: torch.device

    @abstractmethod
    def forward(
        self, input_ids_T: torch.Tensor, positions_T: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """The final, normalised hidden states.

        Args:
            input_ids_T, positions_T: int64, of any number of tokens of any sequences, at least 1.
            context: where their KV goes and what they see.

        Returns:
            hidden_TD.
        """

    @abstractmethod
    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """fp32 logits_BV over the whole vocabulary, the same on every rank of the group."""
