"""What every served model can do; the transformer and the arithmetic model both are one."""

from abc import ABC, abstractmethod

import torch

from modeling.checkpoint.config import ModelConfig
from modeling.context import AttentionContext
from modeling.kernels.attention import AttentionKernel
from modeling.parallel import TensorParallel


class Model(ABC):
    """A decoder-only model, or one tensor-parallel shard of it.

    Every rank of a tensor-parallel group calls the same methods in the same order.
    """

    config: ModelConfig
    tp: TensorParallel
    kernel: AttentionKernel
    dtype: torch.dtype  # of activations and of the KV pool
    device: torch.device

    def connect(self, tp: TensorParallel) -> None:
        """Compute as a part of ``tp`` from now on: the group of the rank that it was loaded for."""
        assert (tp.rank, tp.size) == (self.tp.rank, self.tp.size), "a shard of another place"
        self.tp = tp

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
