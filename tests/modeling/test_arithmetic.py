"""The arithmetic model: exact however it is split, and wrong as soon as one block is."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.pool import KVPool
from modeling.arithmetic import MAX_KEYS, MODULUS, ArithmeticKernel, ArithmeticModel
from modeling.checkpoint.config import ModelConfig, load_config
from modeling.kernels.attention import Piece
from modeling.paged import PagedAttention, PagedSequence
from modeling.parallel import SingleRank, TensorParallel
from protocol.kv import KVLayout
from tests.arithmetic_reference import expected_tokens

NAME = "arithmetic:layers=2,heads=8,kv_heads=4,head_dim=8,vocab=300"


class Generator:
    """Greedy generation of one sequence on one rank, with its KV open to mischief."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, block_size: int = 16) -> None:
        layout = KVLayout(
            num_layers=config.num_layers,
            num_blocks=80,
            num_kv_heads_total=config.num_kv_heads,
            tp_rank=tp.rank,
            tp_size=tp.size,
            block_size=block_size,
            head_dim=config.head_dim,
            dtype="float32",
        )
        self.pool = KVPool(layout)
        self.model = ArithmeticModel(config, tp)
        self.block_ids = torch.randperm(80, generator=torch.Generator().manual_seed(1)).int()
        self._start = 0

    def next_token(self, token_ids: list[int]) -> int:
        sequence = PagedSequence(self._start, len(token_ids), self.block_ids)
        context = PagedAttention(self.pool, self.model.kernel, self.model.config, [sequence])
        positions = torch.arange(self._start, self._start + len(token_ids))
        hidden = self.model.forward(torch.tensor(token_ids), positions, context)
        self._start += len(token_ids)
        return int(self.model.logits(hidden[-1:]).argmax())

    def generate(self, token_ids: list[int], num_tokens: int, chunk: int = 64) -> list[int]:
        for start in range(0, len(token_ids), chunk):
            token = self.next_token(token_ids[start : start + chunk])
        tokens = [token]
        while len(tokens) < num_tokens:
            tokens.append(self.next_token(tokens[-1:]))
        return tokens


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return load_config(NAME)


def make_prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 200), chunk=st.integers(1, 100), block_size=st.sampled_from([3, 16, 32])
)
def test_paged_in_any_chunks_is_the_reference(
    config: ModelConfig, length: int, chunk: int, block_size: int
) -> None:
    prompt = make_prompt(length)
    got = Generator(config, SingleRank(), block_size).generate(prompt, 6, chunk)
    assert got == expected_tokens(config, prompt, 6)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_tensor_parallel_ranks_agree(
    config: ModelConfig, tp_size: int, as_ranks: Callable[..., Any]
) -> None:
    prompt = make_prompt(90)
    want = expected_tokens(config, prompt, 5)
    results = as_ranks(tp_size, lambda tp: Generator(config, tp).generate(prompt, 5))
    assert results == [want] * tp_size


def test_the_reference_takes_a_prompt_in_any_portions(config: ModelConfig) -> None:
    prompt = make_prompt(300)
    want = expected_tokens(config, prompt, 8)
    assert expected_tokens(config, prompt + want[:3], 5) == want[3:]
    assert not set(expected_tokens(config, prompt, 600)) & set(range(256, 260))


def test_other_prompts_continue_otherwise(config: ModelConfig) -> None:
    prompt = make_prompt(50)
    swapped = [prompt[1], prompt[0], *prompt[2:]]
    shifted = [7, *prompt]
    continuations = {tuple(expected_tokens(config, p, 8)) for p in (prompt, swapped, shifted)}
    assert len(continuations) == 3


def _swap_blocks(g: Generator) -> None:
    g.block_ids[[1, 2]] = g.block_ids[[2, 1]]


def _wrong_block(g: Generator) -> None:
    g.block_ids[1] = g.block_ids[70]


def _stale_head(g: Generator) -> None:
    g.pool.layer(1)[int(g.block_ids[2]), 3] = 0.0


def _swapped_heads(g: Generator) -> None:
    block = g.pool.layer(0)[int(g.block_ids[0])]
    block[[0, 1]] = block[[1, 0]].clone()


def _swapped_k_and_v(g: Generator) -> None:
    block = g.pool.layer(0)[int(g.block_ids[0]), 2]
    block[[0, 1]] = block[[1, 0]].clone()


def _swapped_layers(g: Generator) -> None:
    first = g.pool.layer(0).clone()
    g.pool.layer(0).copy_(g.pool.layer(1))
    g.pool.layer(1).copy_(first)


def _one_number(g: Generator) -> None:
    g.pool.layer(1)[int(g.block_ids[3]), 0, 1, 5, 2] += 1


FAULTS = (
    *(_swap_blocks, _wrong_block, _stale_head, _swapped_heads, _swapped_k_and_v),
    *(_swapped_layers, _one_number),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__[1:])
def test_every_fault_shows(config: ModelConfig, fault: Callable[[Generator], None]) -> None:
    prompt = make_prompt(70)
    want = expected_tokens(config, prompt, 6)
    generator = Generator(config, SingleRank())
    assert generator.generate(prompt, 1) == want[:1]
    fault(generator)
    assert generator.generate(want[:1], 5) != want[1:]


def test_logits_rank_every_token(config: ModelConfig) -> None:
    model = ArithmeticModel(config, SingleRank())
    logits = model.logits(torch.tensor([[5.0], [6.0]]))
    assert logits.shape == (2, 300) and logits.dtype == torch.float32
    assert (logits.max(-1).values == 16.0).all() and (logits == 16.0).sum() == 2
    assert logits.unique().numel() > 100


@settings(max_examples=30, deadline=None)
@given(edges=st.sets(st.integers(1, 49), max_size=4), seed=st.integers(0, 99))
def test_partials_of_any_split_merge_to_the_whole(edges: set[int], seed: int) -> None:
    kernel = ArithmeticKernel()
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randint(MODULUS, (n, h, 4), generator=generator).float()
        for n, h in ((6, 4), (50, 2), (50, 2))
    )
    cuts = [0, *sorted(edges), 50]
    positions = torch.arange(50)
    want, _ = kernel.attend(q, k, v, Piece(False, 50, positions))
    out, lse = torch.zeros(6, 4, 4), torch.full((6, 4), -torch.inf)
    for start, end in itertools.pairwise(cuts):
        keys = slice(start, end)
        kernel.merge_(
            out, lse, *kernel.attend(q, k[keys], v[keys], Piece(False, 50, positions[keys]))
        )
    assert torch.equal(out, want)


def test_sums_are_exact_at_their_limit() -> None:
    kernel = ArithmeticKernel()
    k = torch.full((MAX_KEYS, 1, 1), MODULUS - 1.0)
    q = torch.full((1, 1, 1), MODULUS - 1.0)
    piece = Piece(False, MAX_KEYS, torch.arange(MAX_KEYS))
    whole, _ = kernel.attend(q, k, k, piece)
    # (M - 1) is -1 modulo M, so the sum is that of the weights, and q turns its sign back.
    ones, _ = kernel.attend(torch.ones_like(q), torch.ones_like(k), torch.ones_like(k), piece)
    assert whole.item() == ones.item()
