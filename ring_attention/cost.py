"""What a chunk costs on a ring of any size, from four figures measured when the pool starts.

The prefill scheduler asks, per chunk: on how many ranks (:meth:`CostModel.choose_ring_size`), in
which form (:meth:`CostModel.prefers_pass_q`), and how long it will take
(:meth:`CostModel.chunk_seconds`). T new tokens attend to P cached ones and to themselves; a ring
has N ranks. Plain numbers, no torch: measuring is in measure.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from modeling.checkpoint.config import ModelConfig
from protocol.kv import DTYPE_BYTES

# A ring of N ranks must keep this much of N single ranks' throughput, or the chunk does not ring.
MIN_EFFICIENCY = 0.7


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """The sizes of one tensor-parallel shard of a model that decide what a chunk costs."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    linear_weights: int  # that one token is multiplied with in one layer
    itemsize: int  # bytes of an activation or KV element
    block_size: int

    @classmethod
    def of(
        cls, config: ModelConfig, *, tp_size: int = 1, dtype: str = "bfloat16", block_size: int = 32
    ) -> "ChunkShape":
        attention = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
        per_hidden = attention + 3 * config.intermediate_size
        return cls(
            num_layers=config.num_layers,
            num_heads=config.num_heads // tp_size,
            num_kv_heads=config.num_kv_heads // tp_size,
            head_dim=config.head_dim,
            linear_weights=config.hidden_size * per_hidden // tp_size,
            itemsize=DTYPE_BYTES[dtype],
            block_size=block_size,
        )


@dataclass(frozen=True, slots=True)
class CostModel:
    """One rank's speed: compute, and the link to its ring neighbour in one direction."""

    attention_flops_per_s: float
    linear_flops_per_s: float
    bandwidth_bytes_per_s: float
    latency_s: float  # of one exchange with the neighbours

    def prefers_pass_q(
        self, shape: ChunkShape, new_tokens: int, cached_tokens: int, ring_size: int
    ) -> bool:
        """Whether queries rather than keys should go round the ring (arXiv 2411.01783, Alg. 5).

        Pass-KV iff ``T >= N C Hk e / (2 Hq BW)`` (its messages hide behind compute) or
        ``T / (T + P) >= 2 Hk / Hq - 4 T BW / (N C e)`` (what it exposes is less than the all-to-all
        of partial results that pass-Q exposes). C is attention FLOP/s, BW bytes/s, e bytes per
        element.
        """
        if ring_size == 1:
            return False
        speed = ring_size * self.attention_flops_per_s * shape.itemsize  # N C e
        kv_share = shape.num_kv_heads / shape.num_heads
        if new_tokens >= speed * kv_share / (2 * self.bandwidth_bytes_per_s):
            return False
        miss_rate = new_tokens / (new_tokens + cached_tokens)
        return miss_rate < 2 * kv_share - 4 * new_tokens * self.bandwidth_bytes_per_s / speed

    def chunk_seconds(
        self, shape: ChunkShape, new_tokens: int, cached_tokens: int, ring_size: int
    ) -> float:
        """Predicted time of a chunk, from its first layer to its last.

        The busiest rank computes ``ceil(blocks / N)`` blocks of the chunk. Its attention is cut
        into N steps; at all but the last a message travels meanwhile, and what exceeds the step's
        compute is waited for. Pass-Q then waits for the partial results as well.
        """
        num_blocks = -(-new_tokens // shape.block_size)
        busiest = min(new_tokens, -(-num_blocks // ring_size) * shape.block_size)
        pairs = busiest * (cached_tokens + new_tokens / 2)
        width = shape.num_heads * shape.head_dim
        linear_s = 2 * busiest * shape.linear_weights / self.linear_flops_per_s
        step_s = 4 * pairs * width / self.attention_flops_per_s / ring_size
        layer_s = linear_s + ring_size * step_s
        if ring_size > 1:
            layer_s += (ring_size - 1) * self.latency_s
            q_bytes = busiest * width * shape.itemsize
            if self.prefers_pass_q(shape, new_tokens, cached_tokens, ring_size):
                message_bytes = float(q_bytes)
                exposed_bytes = (ring_size - 1) * (q_bytes + busiest * shape.num_heads * 4)
                layer_s += exposed_bytes / self.bandwidth_bytes_per_s + self.latency_s
            else:
                num_keys = cached_tokens / ring_size + busiest
                message_bytes = num_keys * 2 * shape.num_kv_heads * shape.head_dim * shape.itemsize
            message_s = message_bytes / self.bandwidth_bytes_per_s
            layer_s += (ring_size - 1) * max(0.0, message_s - step_s)
        return shape.num_layers * layer_s

    def choose_ring_size(
        self,
        shape: ChunkShape,
        new_tokens: int,
        cached_tokens: int,
        ring_sizes: Iterable[int],
        *,
        min_efficiency: float = MIN_EFFICIENCY,
    ) -> int:
        """The fastest of ``ring_sizes`` that does not waste the ranks it takes.

        A ring of N is worth taking while ``T(1) / (N T(N)) >= min_efficiency`` and every rank gets
        both an early and a late run of blocks; so short prompts never ring.
        """
        alone_s = self.chunk_seconds(shape, new_tokens, cached_tokens, 1)
        best, best_s = 1, alone_s
        for size in sorted(set(ring_sizes) - {1}):
            if new_tokens < 2 * size * shape.block_size:
                continue
            seconds = self.chunk_seconds(shape, new_tokens, cached_tokens, size)
            if seconds < best_s and alone_s >= min_efficiency * size * seconds:
                best, best_s = size, seconds
        return best
