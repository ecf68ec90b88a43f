"""The ranks of a decode pool on threads of one process, with real pools and models."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from decode.runner import DecodeRunner
from decode.sequence import Sequence
from kvcache.pool import KVPool
from modeling.model import Model
from modeling.parallel import SingleRank, TensorParallel
from modeling.sampling import SamplingRow
from protocol.kv import BlockRef, KVLayout
from protocol.plans import DecodePlan, NewSequence, SampledToken, SequenceStep


class ThreadRank(TensorParallel):
    """One of several ranks in one process; they meet at a barrier."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(slots)
        self._slots, self._barrier = slots, barrier

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._slots[self.rank] = x.clone()
        self._barrier.wait(10)
        gathered = list(self._slots)
        self._barrier.wait(10)
        return gathered

    def all_reduce_(self, x: torch.Tensor) -> None:
        x.copy_(torch.stack([part.float() for part in self._exchange(x)]).sum(0))

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat(self._exchange(x), dim)


def layout_of(model: Model, tp: TensorParallel, num_blocks: int, block_size: int) -> KVLayout:
    return KVLayout(
        num_layers=model.config.num_layers,
        num_blocks=num_blocks,
        num_kv_heads_total=model.config.num_kv_heads,
        tp_rank=tp.rank,
        tp_size=tp.size,
        block_size=block_size,
        head_dim=model.config.head_dim,
        dtype="float32",
    )


class Ranks:
    """All ranks of a decode pool, each on a thread, and the KV that a prefill pool would send."""

    def __init__(
        self, make_model: Callable[[TensorParallel], Model], tp_size: int, shape: tuple[int, int]
    ) -> None:
        num_blocks, self.block_size = shape
        slots: list[Any] = [None] * tp_size
        barrier = threading.Barrier(tp_size)
        single = SingleRank()
        groups = (
            [ThreadRank(i, slots, barrier) for i in range(tp_size)] if tp_size > 1 else [single]
        )
        self._threads = ThreadPoolExecutor(tp_size)
        self._pools, self._runners = [], []
        for tp in groups:
            model = make_model(tp)
            pool = KVPool(layout_of(model, tp, num_blocks, self.block_size))
            pool.tensor.fill_(float("nan"))  # what was never written must never be read
            self._pools.append(pool)
            self._runners.append(DecodeRunner(tp.rank, model, pool))
        source = make_model(single)
        self._source_pool = KVPool(layout_of(source, single, 64, self.block_size))
        self._source = DecodeRunner(1, source, self._source_pool)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown()

    @property
    def num_known(self) -> int:
        return max(runner.num_sequences for runner in self._runners)

    def execute(self, plan: DecodePlan, sampled: list[Sequence]) -> list[SampledToken]:
        rows = [
            SamplingRow(s.sampling, len(s.output_token_ids), s.prompt_token_ids, s.output_token_ids)
            for s in sampled
        ]
        futures = [
            self._threads.submit(runner.execute, plan, rows if rank == 0 else ())
            for rank, runner in enumerate(self._runners)
        ]
        results = [future.result(20) for future in futures]
        assert [result.rank for result in results] == list(range(len(results)))
        assert not any(result.tokens for result in results[1:]), "rank 0 alone samples"
        return list(results[0].tokens)

    def land(self, prompt: tuple[int, ...], first_logical: int, blocks: list[BlockRef]) -> None:
        block_ids = tuple(range(64))
        step = SequenceStep("p", 0, 0, prompt, (), False)
        self._source.execute(DecodePlan(1, (step,), new=(NewSequence("p", 0, block_ids),)))
        for pool in self._pools:
            heads = slice(pool.layout.first_kv_head, None)
            for logical, block in enumerate(blocks, first_logical):
                end = min(self.block_size, len(prompt) - logical * self.block_size)
                source = self._source_pool.tensor[:, logical, heads, :, :end]
                pool.tensor[:, block.block_id, :, :, :end] = source[:, : pool.layout.num_kv_heads]

    def spoil(self, block: BlockRef) -> None:
        for pool in self._pools:
            pool.tensor[:, block.block_id] = float("nan")
