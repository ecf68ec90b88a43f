"""Executes a prefill plan on one rank.

1. Items are taken in the plan's order; a rank skips those whose ring it is not in.
2. Before the first chunk of a request its cached blocks are announced, then the chunk runs round
   its ring, and each group of layers is announced as soon as it is final.
3. Each rank looks whether its tokens' last hidden states are finite: KV that is not makes them so
   too, and must be found before its blocks are offered to later prompts.
4. The rank that computed the prompt's last token takes the logits, all its tensor-parallel shards
   together; shard 0 samples the first token.
5. After the last chunk every rank of the pool, in the ring or not, says that it announced all.
"""

import time

import torch

from kvcache.pool import KVPool
from modeling.matchers import Matchers
from modeling.model import Model
from modeling.sampling import SamplingRow, is_finite, sample
from prefill.announcer import Announcer
from protocol.plans import (
    ChunkWork,
    FailedRow,
    Plan,
    PrefillPlan,
    RowResult,
    StepResult,
    row_result,
)
from protocol.request import NoToken
from ring_attention.comm import RingComm
from ring_attention.context import RingAttention, forward_chunk
from ring_attention.ring import RingBuffers


class PrefillRunner:
    """One rank's part of every plan.

    Args:
        rank: in the pool's (cp, tp) mesh, ``cp_rank * tp_size + tp_rank``.
        model: this rank's shard.
        pool: this rank's KV.
        comm: to the other cp ranks; None in a pool without any.
        announcer: of this rank.
    """

    def __init__(
        self,
        rank: int,
        model: Model,
        pool: KVPool,
        comm: RingComm | None,
        announcer: Announcer,
        matchers: Matchers | None = None,
    ) -> None:
        self._rank = rank
        self._cp_rank, self._tp_rank = divmod(rank, pool.layout.tp_size)
        self._model = model
        self._pool = pool
        self._comm = comm
        self._announcer = announcer
        self._matchers = matchers
        self._buffers = RingBuffers(pool.device)

    def execute(self, plan: Plan) -> StepResult:
        """Execute this rank's items; blocks until they are computed.

        Raises:
            PeerError: a rank of a ring did not do its part in time.
        """
        assert isinstance(plan, PrefillPlan), plan
        started = time.perf_counter()
        rows: list[RowResult] = []
        for work in plan.work:
            if self._cp_rank in work.ring:
                rows += self._compute(work)
            self._announcer.chunk_done(work)
        return StepResult.of(plan.step, self._rank, rows, time.perf_counter() - started)

    @torch.inference_mode()
    def _compute(self, work: ChunkWork) -> list[RowResult]:
        self._announcer.cached(work)
        context = RingAttention(
            work,
            self._cp_rank,
            self._pool,
            self._comm if len(work.ring) > 1 else None,
            self._model.kernel,
            self._model.config,
            self._announcer.layer_callback(work),
            buffers=self._buffers,
        )
        hidden_TD = forward_chunk(self._model, context)
        last = context.last_token_index
        failed: list[RowResult] = []
        if hidden_TD is not None and not is_finite(hidden_TD):
            failed.append(FailedRow(*work.key, why=NoToken.NON_FINITE))
        if work.sampling is None or last is None:
            return failed
        assert hidden_TD is not None, "a rank with the last token has tokens"
        logits_1V = self._model.logits(hidden_TD[last : last + 1])  # all shards are in this, always
        if self._tp_rank != 0 or failed:
            return failed
        # The tokens that earlier attempts have generated count as output, not as prompt.
        num_given = max(0, len(work.prompt_token_ids) - work.num_output_tokens)
        row = SamplingRow(
            params=work.sampling,
            index=work.num_output_tokens,
            prompt_token_ids=work.prompt_token_ids[:num_given],
            output_token_ids=work.prompt_token_ids[num_given:],
        )
        if work.sampling.grammar and self._matchers is not None:
            row = self._matchers.constrain(work.key, row)
            self._matchers.forget(work.key)  # the decode pool goes on from here
        [chosen] = sample(logits_1V, [row])
        return [row_result(work.key, chosen)]
