"""The measured cost model for one pool: its model's shape filled in, the operator's word kept."""

from collections.abc import Sequence
from dataclasses import dataclass

from ring_attention.cost import ChunkShape, CostModel


@dataclass(frozen=True, slots=True)
class PoolCosts:
    """What the scheduler asks; see :class:`prefill.placement.ChunkCosts`.

    Args:
        ring_threshold_tokens: prompts of at least that many tokens to compute ring over all ranks,
            shorter ones never do; None leaves it to the cost model.
    """

    model: CostModel
    shape: ChunkShape
    ring_threshold_tokens: int | None = None

    def seconds(self, new: int, cached: int, ring_size: int) -> float:
        return self.model.chunk_seconds(self.shape, new, cached, ring_size)

    def prefers_pass_q(self, new: int, cached: int, ring_size: int) -> bool:
        return self.model.prefers_pass_q(self.shape, new, cached, ring_size)

    def worth_taking(self, new: int, cached: int, ring_sizes: Sequence[int]) -> Sequence[int]:
        if self.ring_threshold_tokens is not None:
            return (max(ring_sizes) if new >= self.ring_threshold_tokens else 1,)
        largest = self.model.choose_ring_size(self.shape, new, cached, ring_sizes)
        return [size for size in ring_sizes if size <= largest]
