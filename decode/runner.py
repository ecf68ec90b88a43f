"""Executes a decode plan on one rank.

1. Swap: blocks go to host memory or come back, in the plan's order, before anything is computed, so
   that a block freed by one sequence may serve another in the same step.
2. Drop and add sequences, append the blocks by which others have grown.
3. One forward pass over every sequence's tokens, the single ones in front.
4. Rank 0 checks that the hidden states of each prompt's chunk are finite, because its KV is offered
   to others next. A single token that is not finite shows in its logits.
5. Logits of the last tokens that are to be sampled, all tensor-parallel shards together. Rank 0
   alone has the sampling rows, and samples.

Shape suffixes: T tokens of the batch, B sampled rows, D hidden size, V vocabulary.
"""

import time
from collections.abc import Sequence

import torch

from decode.sequence import Sequence as DecodeSequence
from kvcache.pool import KVPool
from modeling.matchers import Matchers
from modeling.model import Model
from modeling.paged import PagedAttention, PagedSequence
from modeling.sampling import SamplingRow, is_finite, needs_history, sample
from protocol.plans import (
    DecodePlan,
    FailedRow,
    Plan,
    RowResult,
    SequenceStep,
    StepResult,
    SwapBlocks,
    row_result,
)
from protocol.request import NoToken, RequestKey


def sampling_row(sequence: DecodeSequence) -> SamplingRow:
    """The sampling of a sequence's next token, whichever attempts generated those before it."""
    index = sequence.num_generated_tokens
    params = sequence.sampling
    if not needs_history(params):
        return SamplingRow(params, index)
    prompt_token_ids, output_token_ids = sequence.history()
    return SamplingRow(params, index, prompt_token_ids, output_token_ids)


class DecodeRunner:
    """One rank's part of every plan.

    Args:
        rank: in the pool.
        model: this rank's shard.
        pool: this rank's KV.
        matchers: of requests with a grammar, on rank 0.
    """

    def __init__(
        self, rank: int, model: Model, pool: KVPool, matchers: Matchers | None = None
    ) -> None:
        self._rank = rank
        self._model = model
        self._pool = pool
        self._matchers = matchers
        self._tables: dict[RequestKey, torch.Tensor] = {}  # int32 block ids, on CPU, logical order
        self._host: dict[RequestKey, torch.Tensor] = {}  # KV of pre-empted sequences

    @property
    def num_sequences(self) -> int:
        """Sequences that this rank has, computed or in host memory."""
        return len(self._tables) + len(self._host)

    @torch.inference_mode()
    def execute(self, plan: Plan, rows: Sequence[SamplingRow] = ()) -> StepResult:
        """Execute this rank's part; blocks until it is computed.

        Args:
            plan: the leader's.
            rows: how to sample, on rank 0 only: one for each step that samples, in their order.

        Raises:
            PeerError: another rank did not do its part in time.
        """
        assert isinstance(plan, DecodePlan), plan
        started = time.perf_counter()
        for swap in plan.swaps:
            self._swap(swap)
        for key in plan.dropped:
            self._tables.pop(key, None)
            self._host.pop(key, None)
            if self._matchers is not None:
                self._matchers.forget(key)
        for new in plan.new:
            table = torch.tensor(new.block_ids, dtype=torch.int32)
            self._tables[new.key] = table
        results = self._compute(plan, rows) if plan.sequences else []
        return StepResult.of(plan.step, self._rank, results, time.perf_counter() - started)

    def _swap(self, swap: SwapBlocks) -> None:
        key = swap.key
        if swap.out:
            self._tables.pop(key, None)
            self._host[key] = self._pool.save(swap.block_ids)
        else:
            self._pool.restore(swap.block_ids, self._host.pop(key))

    def _compute(self, plan: DecodePlan, rows: Sequence[SamplingRow]) -> list[RowResult]:
        device = self._pool.device
        sequences: list[PagedSequence] = []
        token_ids: list[int] = []
        positions: list[int] = []
        sampled: list[int] = []  # rows of the batch
        for step in plan.sequences:
            key = step.key
            table = self._tables[key]
            if step.new_block_ids:
                added = torch.tensor(step.new_block_ids, dtype=torch.int32)
                table = self._tables[key] = torch.cat((table, added))
            num_tokens = len(step.token_ids)
            sequences.append(PagedSequence(step.start, num_tokens, table))
            token_ids += step.token_ids
            positions += range(step.start, step.start + num_tokens)
            if step.sample:
                sampled.append(len(token_ids) - 1)
        context = PagedAttention(self._pool, self._model.kernel, self._model.config, sequences)
        hidden_TD = self._model.forward(
            torch.tensor(token_ids, dtype=torch.int64, device=device),
            torch.tensor(positions, dtype=torch.int64, device=device),
            context,
        )
        results = self._failed_chunks(plan, hidden_TD) if self._rank == 0 else []
        if not sampled:
            self._finish_on_device()
            return results
        if len(sampled) < len(token_ids):
            hidden_TD = hidden_TD[torch.tensor(sampled, device=device)]
        # On a GPU the forward pass is still running while the masks are made.
        steps = [step for step in plan.sequences if step.sample]
        rows = [self._constrained(step, row) for step, row in zip(steps, rows, strict=False)]
        logits_BV = self._model.logits(hidden_TD)
        if self._rank == 0:
            results += (
                row_result(step.key, chosen)
                for step, chosen in zip(steps, sample(logits_BV, rows), strict=True)
            )
        return results

    def _constrained(self, step: SequenceStep, row: SamplingRow) -> SamplingRow:
        if not row.params.grammar or self._matchers is None:
            return row
        return self._matchers.constrain(step.key, row)

    @staticmethod
    def _failed_chunks(plan: DecodePlan, hidden_TD: torch.Tensor) -> list[RowResult]:
        failed: list[RowResult] = []
        first = 0
        for step in plan.sequences:
            end = first + len(step.token_ids)
            is_chunk = len(step.token_ids) > 1 or not step.sample
            if is_chunk and not is_finite(hidden_TD[first:end]):
                failed.append(FailedRow(*step.key, why=NoToken.NON_FINITE))
            first = end
        return failed

    def _finish_on_device(self) -> None:
        """Wait for a GPU: when the step ends, its blocks may be given to other sequences."""
        if self._pool.device.type == "cuda":
            torch.cuda.synchronize(self._pool.device)
