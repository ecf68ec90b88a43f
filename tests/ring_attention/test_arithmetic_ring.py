"""Whole forward passes of the arithmetic model over rings: the next token is right or it is not."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec
import pytest
import torch

from kvcache.pool import KVPool
from modeling.arithmetic import ArithmeticModel
from modeling.checkpoint.config import ModelConfig, load_config
from modeling.parallel import SingleRank
from protocol.kv import KVLayout
from protocol.plans import ChunkWork, PlacedBlock
from ring_attention.comm import RingComm
from ring_attention.context import RingAttention, forward_chunk
from ring_attention.partition import deal_zigzag
from tests.arithmetic_reference import expected_tokens
from tests.ring_attention.ring_cases import on_threads

BLOCK_SIZE = 4
POOL_BLOCKS = 64
CONFIG = load_config("arithmetic:layers=3,heads=4,kv_heads=2,head_dim=4")


@dataclass
class Prefiller:
    """A pool of virtual ranks that computes one prompt chunk by chunk."""

    prompt: list[int]
    num_ranks: int
    seed: int = 0
    config: ModelConfig = CONFIG
    placed: list[PlacedBlock] = field(default_factory=list)

    def __post_init__(self) -> None:
        layout = KVLayout(
            self.config.num_layers,
            POOL_BLOCKS,
            self.config.num_kv_heads,
            0,
            1,
            BLOCK_SIZE,
            self.config.head_dim,
            "float32",
        )
        self.rng = random.Random(self.seed)
        self.pools = [KVPool(layout) for _ in range(self.num_ranks)]
        ids = range(POOL_BLOCKS)
        self.free = [self.rng.sample(ids, POOL_BLOCKS) for _ in self.pools]
        self.model = ArithmeticModel(self.config, SingleRank())

    def chunk(self, start: int, end: int, ring: tuple[int, ...], pass_q: bool) -> ChunkWork:
        first_block = start // BLOCK_SIZE
        dealt = deal_zigzag(-(-(end - start) // BLOCK_SIZE), len(ring))
        for rank, blocks in zip(ring, dealt, strict=True):
            self.placed += [
                PlacedBlock(first_block + block, rank, self.free[rank].pop(), 0) for block in blocks
            ]
        self.placed.sort(key=lambda block: block.logical)
        return ChunkWork(
            request_id="r",
            attempt=0,
            chunk=0,
            start=start,
            token_ids=tuple(self.prompt[start:end]),
            ring=ring,
            pass_q=pass_q,
            blocks=tuple(self.placed),
            is_last=end == len(self.prompt),
        )

    def run(self, work: ChunkWork) -> int:
        """The token after the chunk, from the one rank that computed its last token."""
        found = [token for token in on_threads(work.ring, self._rank(work)) if token is not None]
        (token,) = found
        return int(token)

    def _rank(self, work: ChunkWork) -> Callable[[int, RingComm], int | None]:
        def run(rank: int, comm: RingComm) -> int | None:
            context = RingAttention(
                work, rank, self.pools[rank], comm, self.model.kernel, self.config
            )
            hidden_TD = forward_chunk(self.model, context)
            if context.last_token_index is None:
                return None
            assert hidden_TD is not None
            last_BD = hidden_TD[context.last_token_index].unsqueeze(0)
            return int(self.model.logits(last_BD).argmax())

        return run


def prompt_of(num_tokens: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(num_tokens)]


@pytest.mark.parametrize("pass_q", [False, True], ids=["pass_kv", "pass_q"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_tokens", [1, 5, 30, 101])
def test_one_chunk(num_tokens: int, num_ranks: int, pass_q: bool) -> None:
    prompt = prompt_of(num_tokens, num_ranks)
    pool = Prefiller(prompt, num_ranks)
    token = pool.run(pool.chunk(0, num_tokens, tuple(range(num_ranks)), pass_q))
    assert [token] == expected_tokens(CONFIG, prompt, 1)


@pytest.mark.parametrize("seed", range(6))
def test_chunks_each_in_its_own_form(seed: int) -> None:
    """Every ring holds all ranks that own a block; its order may change from chunk to chunk."""
    prompt = prompt_of(90 + seed, seed)
    pool = Prefiller(prompt, 4, seed)
    bounds = [0, 32, 36, 64, 88, len(prompt)]
    for index, (start, end) in enumerate(pairwise(bounds)):
        ring = tuple(pool.rng.sample(range(4), 4))
        token = pool.run(pool.chunk(start, end, ring, pass_q=(index + seed) % 2 == 1))
        assert [token] == expected_tokens(CONFIG, prompt[:end], 1)


@pytest.mark.parametrize("pass_q", [False, True], ids=["pass_kv", "pass_q"])
@pytest.mark.parametrize("across_ranks", [False, True])
def test_two_swapped_blocks_give_another_token(across_ranks: bool, pass_q: bool) -> None:
    prompt = prompt_of(70, 3)
    pool = Prefiller(prompt, 2)
    pool.run(pool.chunk(0, 48, (0, 1), pass_q=False))
    work = pool.chunk(48, 70, (0, 1), pass_q)
    assert [pool.run(work)] == expected_tokens(CONFIG, prompt, 1)
    first = work.blocks[0]
    second = next(
        block for block in work.blocks[1:12] if (block.cp_rank != first.cp_rank) == across_ranks
    )
    swapped = {
        first.logical: msgspec.structs.replace(second, logical=first.logical),
        second.logical: msgspec.structs.replace(first, logical=second.logical),
    }
    blocks = tuple(swapped.get(block.logical, block) for block in work.blocks)
    wrong = pool.run(msgspec.structs.replace(work, blocks=blocks))
    assert [wrong] != expected_tokens(CONFIG, prompt, 1)


def test_a_stale_block_gives_another_token() -> None:
    prompt = prompt_of(40, 4)
    pool = Prefiller(prompt, 2)
    pool.run(pool.chunk(0, 32, (0, 1), pass_q=False))
    work = pool.chunk(32, 40, (0, 1), pass_q=False)
    block = work.blocks[2]
    pool.pools[block.cp_rank].layer(1)[block.block_id].add_(torch.ones(()))
    assert [pool.run(work)] != expected_tokens(CONFIG, prompt, 1)
