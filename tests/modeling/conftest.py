"""Small exact stand-ins: attention over plain tensors, and tensor-parallel ranks as threads."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from modeling.context import AttentionContext
from modeling.parallel import TensorParallel


class DenseAttention(AttentionContext):
    """One sequence, its KV in plain tensors, attention written out in fp64."""

    def __init__(self, windows: tuple[int | None, ...]) -> None:
        self._windows = windows
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self.layers_done: list[int] = []

    def attend(
        self, layer: int, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor
    ) -> torch.Tensor:
        if layer in self._keys:
            k_TKH = torch.cat([self._keys[layer], k_TKH])
            v_TKH = torch.cat([self._values[layer], v_TKH])
        self._keys[layer], self._values[layer] = k_TKH.clone(), v_TKH.clone()
        num_queries, num_heads, head_dim = q_TNH.shape
        groups = num_heads // k_TKH.shape[1]
        k_SNH = k_TKH.double().repeat_interleave(groups, dim=1)
        v_SNH = v_TKH.double().repeat_interleave(groups, dim=1)
        scores = torch.einsum("tnh,snh->nts", q_TNH.double(), k_SNH) * head_dim**-0.5
        keys = torch.arange(k_SNH.shape[0])
        queries = keys[-num_queries:, None]
        hidden = keys > queries
        window = self._windows[layer]
        if window is not None:
            hidden |= keys <= queries - window
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("nts,snh->tnh", weights, v_SNH).to(q_TNH.dtype)

    def layer_done(self, layer: int) -> None:
        self.layers_done.append(layer)


class ThreadRank(TensorParallel):
    """One of several ranks in one process; they meet at a barrier."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.size = len(slots)
        self._slots = slots
        self._barrier = barrier

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._slots[self.rank] = x
        self._barrier.wait()
        everyone = [slot.clone() for slot in self._slots]
        self._barrier.wait()
        return everyone

    def all_reduce_(self, x: torch.Tensor) -> None:
        assert x.is_contiguous()
        x.copy_(torch.stack([part.float() for part in self._exchange(x)]).sum(0))

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat(self._exchange(x), dim=dim)


def run_as_ranks(size: int, work: Callable[[TensorParallel], Any], timeout_s: float = 60.0) -> Any:
    """``work`` on each of ``size`` ranks at once; their results by rank."""
    slots: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=timeout_s)

    def release_the_others(future: Future[Any]) -> None:
        if future.exception() is not None:
            barrier.abort()

    with ThreadPoolExecutor(size) as pool:
        ranks = [pool.submit(work, ThreadRank(rank, slots, barrier)) for rank in range(size)]
        for future in ranks:
            future.add_done_callback(release_the_others)
    errors = [error for future in ranks if (error := future.exception()) is not None]
    causes = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if errors:
        raise (causes or errors)[0]
    return [future.result() for future in ranks]


@pytest.fixture(scope="session")
def dense_attention() -> type[DenseAttention]:
    """The exact attention context of one sequence."""
    return DenseAttention


@pytest.fixture(scope="session")
def as_ranks() -> Callable[..., Any]:
    """The function that runs ranks as threads."""
    return run_as_ranks
