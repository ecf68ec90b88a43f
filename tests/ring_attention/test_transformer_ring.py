"""A real transformer over rings: the same logits as on one rank."""

from pathlib import Path

import pytest
import torch

from bench.checkpoint import SHAPES, write_llama
from kvcache.pool import KVPool
from modeling.loader import load_model
from modeling.model import Model
from modeling.parallel import SingleRank
from protocol.kv import KVLayout
from protocol.plans import ChunkWork, PlacedBlock
from ring_attention.comm import RingComm
from ring_attention.context import RingAttention, forward_chunk
from ring_attention.partition import deal_zigzag
from tests.ring_attention.ring_cases import on_threads

BLOCK_SIZE = 16
NUM_TOKENS = 333


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    write_llama(folder, {**SHAPES["small"], "dtype": "float32"})
    return load_model(str(folder), tp=SingleRank(), dtype="float32", device="cpu")


def last_logits(model: Model, size: int, pass_q: bool) -> torch.Tensor:
    config = model.config
    num_blocks = -(-NUM_TOKENS // BLOCK_SIZE)
    layout = KVLayout(
        config.num_layers, num_blocks, config.num_kv_heads, 0, 1, BLOCK_SIZE, config.head_dim,
        "float32",
    )  # fmt: skip
    owners = {
        block: rank for rank, blocks in enumerate(deal_zigzag(num_blocks, size)) for block in blocks
    }
    work = ChunkWork(
        request_id="r",
        attempt=0,
        chunk=0,
        start=0,
        token_ids=tuple(token * 7 % 2000 for token in range(NUM_TOKENS)),
        ring=tuple(range(size)),
        pass_q=pass_q,
        blocks=tuple(PlacedBlock(block, owners[block], block, 0) for block in range(num_blocks)),
        is_last=True,
    )

    def run(rank: int, comm: RingComm) -> torch.Tensor | None:
        context = RingAttention(work, rank, KVPool(layout), comm, model.kernel, config)
        hidden_TD = forward_chunk(model, context)
        if context.last_token_index is None or hidden_TD is None:
            return None
        return model.logits(hidden_TD[context.last_token_index].unsqueeze(0))

    (logits_1V,) = (logits for logits in on_threads(work.ring, run) if logits is not None)
    return logits_1V


@pytest.mark.parametrize("pass_q", [False, True], ids=["pass_kv", "pass_q"])
@pytest.mark.parametrize("size", [2, 3])
def test_logits_do_not_depend_on_the_ring(model: Model, size: int, pass_q: bool) -> None:
    alone, ringed = last_logits(model, 1, False), last_logits(model, size, pass_q)
    assert float((ringed - alone).norm() / alone.norm()) <= 1e-5
