"""The four figures of the cost model, measured when a pool starts.

1. Each rank times its own attention and a linear layer.
2. All ranks of the pool pass a small and a large message once round at the same time, which is how
   a ring loads its links, and time it.
3. The leader's figures become the pool's :class:`CostModel`.
"""

import time
from collections.abc import Callable

import torch

from modeling.kernels.attention import AttentionKernel, Piece
from ring_attention.comm import RingComm
from ring_attention.cost import ChunkShape, CostModel

NUM_TOKENS = 512
SMALL_BYTES = 64
LARGE_BYTES = 4 << 20
REPEATS = 3


def measure_cost_model(
    kernel: AttentionKernel,
    shape: ChunkShape,
    dtype: torch.dtype,
    device: torch.device,
    comm: RingComm | None,
    ring: tuple[int, ...],
    cp_rank: int,
) -> CostModel:
    """Measure this rank and its link; takes a fraction of a second after warming up.

    All ranks of the pool call it at the same time.

    Args:
        kernel: the device's attention.
        shape: of the model's shard.
        dtype: of activations.
        device: of this rank.
        comm: None in a pool of one, whose link is then free.
        ring: all cp ranks of the pool.
        cp_rank: this one.

    Raises:
        PeerError: a rank did not take part in time.
    """
    attention = _attention_flops_per_s(kernel, shape, dtype, device)
    linear = _linear_flops_per_s(shape, dtype, device)
    latency_s = 0.0
    bandwidth = float("inf")
    if comm is not None and len(ring) > 1:
        latency_s = _exchange_seconds(comm, ring, cp_rank, SMALL_BYTES, device)
        large_s = _exchange_seconds(comm, ring, cp_rank, LARGE_BYTES, device)
        bandwidth = LARGE_BYTES / max(large_s - latency_s, 1e-9)
    return CostModel(
        attention_flops_per_s=attention,
        linear_flops_per_s=linear,
        bandwidth_bytes_per_s=bandwidth,
        latency_s=latency_s,
    )


def _attention_flops_per_s(
    kernel: AttentionKernel, shape: ChunkShape, dtype: torch.dtype, device: torch.device
) -> float:
    def rows(num_heads: int) -> torch.Tensor:
        return torch.randn(NUM_TOKENS, num_heads, shape.head_dim).to(device, dtype)

    q_TNH = rows(shape.num_heads)
    k_SKH, v_SKH = rows(shape.num_kv_heads), rows(shape.num_kv_heads)
    piece = Piece(False, NUM_TOKENS, torch.arange(NUM_TOKENS))
    seconds = _best_seconds(lambda: kernel.attend(q_TNH, k_SKH, v_SKH, piece), device)
    return 4 * NUM_TOKENS**2 * shape.num_heads * shape.head_dim / seconds


def _linear_flops_per_s(shape: ChunkShape, dtype: torch.dtype, device: torch.device) -> float:
    width = shape.num_heads * shape.head_dim
    x_TD = torch.randn(NUM_TOKENS, width).to(device, dtype)
    weight = torch.randn(2 * width, width).to(device, dtype)
    seconds = _best_seconds(lambda: torch.nn.functional.linear(x_TD, weight), device)
    return 2 * NUM_TOKENS * weight.numel() / seconds


def _exchange_seconds(
    comm: RingComm, ring: tuple[int, ...], cp_rank: int, num_bytes: int, device: torch.device
) -> float:
    index = ring.index(cp_rank)
    left, right = ring[index - 1], ring[(index + 1) % len(ring)]
    outgoing = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    incoming = torch.empty_like(outgoing)

    def exchange() -> None:
        comm.exchange([(right, outgoing)], [(left, incoming)]).wait()

    return _best_seconds(exchange, device)


def _best_seconds(action: Callable[[], object], device: torch.device) -> float:
    """The best of a few runs, after one that pays for allocations and compilation."""
    action()
    best = float("inf")
    for _ in range(REPEATS):
        _settle(device)
        started = time.perf_counter()
        action()
        _settle(device)
        best = min(best, time.perf_counter() - started)
    return best


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
