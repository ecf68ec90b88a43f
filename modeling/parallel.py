"""Tensor parallelism: what a layer asks of the ranks that hold its other shards.

Every rank of a group calls the same methods in the same order with the same shapes; nothing else is
said between them. After ``all_reduce_`` all ranks hold identical bits.
"""

from abc import ABC, abstractmethod

import torch


class TensorParallel(ABC):
    """One rank's view of its tensor-parallel group."""

    rank: int
    size: int

    @abstractmethod
    def all_reduce_(self, x: torch.Tensor) -> None:
        """Sum ``x`` over the group, in place and in fp32, to identical bits on every rank.

        Args:
            x: contiguous, float32 or bfloat16, the same shape on every rank.

        Raises:
            PeerError: a rank did not come within the group's timeout.
        """

    @abstractmethod
    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Concatenate every rank's ``x`` along ``dim`` in rank order, into a new tensor.

        Args:
            x: the same shape on every rank.

        Raises:
            PeerError: a rank did not come within the group's timeout.
        """

    def close(self) -> None:  # noqa: B027 - most groups hold nothing
        """Let go of what the group holds; idempotent."""


class SingleRank(TensorParallel):
    """No tensor parallelism: the rank holds every shard."""

    rank = 0
    size = 1

    def all_reduce_(self, x: torch.Tensor) -> None:
        pass

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:  # noqa: ARG002 - one shard
        return x
