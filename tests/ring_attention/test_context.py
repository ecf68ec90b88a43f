"""A chunk's life through RingAttention: chunk after chunk, ranks without tokens, what it tells."""

import random
from collections.abc import Callable

import msgspec
import pytest
import torch

from modeling.context import AttentionContext
from modeling.kernels.attention import AttentionKernel
from modeling.kernels.cpu_attention import CpuKernel
from modeling.model import Model
from protocol.plans import PlacedBlock
from ring_attention.comm import RingComm
from ring_attention.context import RingAttention, forward_chunk
from ring_attention.cost import ChunkShape
from ring_attention.measure import measure_cost_model
from ring_attention.partition import deal_zigzag
from ring_attention.ring import RingBuffers
from tests.ring_attention.ring_cases import (
    DenseKernel,
    PositionKernel,
    RingCase,
    Setup,
    assemble,
    on_threads,
)


class OneLayer(Model):
    """Attends with a case's own q, k and v, and gives the output as its hidden state."""

    def __init__(self, case: RingCase, kernel: AttentionKernel) -> None:
        self.case = case
        self.config = case.config
        self.kernel = kernel
        self.dtype = torch.float32
        self.device = torch.device("cpu")

    @torch.inference_mode()
    def forward(
        self, input_ids_T: torch.Tensor, positions_T: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        case = self.case
        assert input_ids_T.tolist() == [
            case.work.token_ids[position - case.start] for position in positions_T.tolist()
        ]
        q, k, v = case.q_SNH[positions_T], case.k_SKH[positions_T], case.v_SKH[positions_T]
        out = context.attend(0, q, k, v)
        context.layer_done(0)
        return out.flatten(1)

    def logits(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        return hidden_BD


def run_chunk(case: RingCase, rank: int, comm: RingComm, **options: RingBuffers) -> RingAttention:
    model = OneLayer(case, PositionKernel())
    done: list[int] = []
    context = RingAttention(
        case.work, rank, case.pools[rank], comm, model.kernel, case.config, done.append, **options
    )
    hidden_TD = forward_chunk(model, context)
    assert done == [0]
    if context.num_tokens:
        assert hidden_TD is not None
        expected = case.expected_position_sum()[context.positions_T - case.start]
        assert torch.equal(hidden_TD, expected.flatten(1))
    else:
        assert hidden_TD is None
    return context


@pytest.mark.parametrize("pass_q", [False, True], ids=["pass_kv", "pass_q"])
def test_ranks_without_tokens_give_their_cached_keys(pass_q: bool) -> None:
    setup = Setup(
        ring=(0, 1, 2, 3), num_prefix_blocks=20, num_tokens=6, pass_q=pass_q, integers=True
    )
    case = setup.build()
    contexts = on_threads(setup.ring, lambda rank, comm: run_chunk(case, rank, comm))
    assert [context.num_tokens for context in contexts] == [4, 2, 0, 0]
    assert [context.last_token_index for context in contexts] == [None, 1, None, None]


def test_the_chunks_of_a_prompt_follow_one_another_on_rings_of_any_size() -> None:
    """Each chunk's prefix lies as earlier chunks were dealt; buffers are used again."""
    whole = Setup(ring=(0, 1, 2), num_tokens=95, integers=True).build()
    expected = whole.expected_position_sum()
    buffers = {rank: RingBuffers() for rank in whole.setup.ring}
    rng = random.Random(5)
    placed: list[PlacedBlock] = []
    for chunk, (start, end) in enumerate([(0, 40), (40, 44), (44, 80), (80, 95)]):
        num_blocks = -(-(end - start) // 4)
        ring = (0, 1, 2) if chunk % 2 else (1, 2, 0)
        for rank, blocks in zip(ring, deal_zigzag(num_blocks, 3), strict=True):
            taken = {block.block_id for block in placed if block.cp_rank == rank}
            free = rng.sample(sorted(set(range(27)) - taken), len(blocks))
            placed += [
                PlacedBlock(start // 4 + block, rank, block_id, 0)
                for block, block_id in zip(blocks, free, strict=True)
            ]
        placed.sort(key=lambda block: block.logical)
        whole.work = msgspec.structs.replace(
            whole.work,
            start=start,
            token_ids=(1,) * (end - start),
            ring=ring,
            pass_q=chunk == 2,
            blocks=tuple(placed),
        )
        parts = on_threads(ring, share_of(whole, buffers))
        whole.start, whole.end = start, end
        assert torch.equal(assemble(whole, parts), expected[start:end])


def share_of(
    case: RingCase, buffers: dict[int, RingBuffers]
) -> Callable[[int, RingComm], tuple[torch.Tensor, torch.Tensor]]:
    def run(rank: int, comm: RingComm) -> tuple[torch.Tensor, torch.Tensor]:
        context = RingAttention(
            case.work,
            rank,
            case.pools[rank],
            comm,
            PositionKernel(),
            case.config,
            buffers=buffers[rank],
        )
        positions = context.positions_T
        if not context.num_tokens:
            context.attend_empty(0)
            return positions, case.q_SNH[:0]
        rows = (tensor[positions] for tensor in (case.q_SNH, case.k_SKH, case.v_SKH))
        return positions, context.attend(0, *rows)

    return run


def test_buffers_made_in_inference_mode_serve_outside_of_it() -> None:
    setup = Setup(num_tokens=40, num_prefix_blocks=4, integers=True)
    buffers = {rank: RingBuffers() for rank in setup.ring}
    case = setup.build()
    on_threads(setup.ring, lambda rank, comm: run_chunk(case, rank, comm, buffers=buffers[rank]))
    on_threads(setup.ring, share_of(case, buffers))


def test_a_ring_of_one_needs_no_comm() -> None:
    case = Setup(ring=(3,), num_tokens=21, num_prefix_blocks=2).build()
    _, out_TNH = case.attend(3, None, DenseKernel())
    assert (out_TNH.double() - case.expected_attention()).abs().max() < 1e-5


def test_cost_is_measured_by_all_ranks_together() -> None:
    shape = ChunkShape(1, 4, 2, 8, 1000, 4, 16)
    ring = (0, 1, 2)
    models = on_threads(
        ring,
        lambda rank, comm: measure_cost_model(
            CpuKernel(native=False), shape, torch.float32, torch.device("cpu"), comm, ring, rank
        ),
    )
    for model in models:
        assert model.attention_flops_per_s > 0 and model.linear_flops_per_s > 0
        assert 0 < model.bandwidth_bytes_per_s < float("inf") and model.latency_s > 0
