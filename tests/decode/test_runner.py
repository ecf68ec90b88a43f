"""Scheduler and runners together: real KV pools, real models, tokens that can only be right."""

import random
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest

from decode.runner import sampling_row
from decode.sequence import Sequence
from modeling.arithmetic import ArithmeticModel
from modeling.checkpoint.config import load_config
from protocol.messages import Reserve
from protocol.request import SamplingParams
from tests.arithmetic_reference import expected_tokens

CONFIG = load_config("arithmetic:layers=2,heads=4,kv_heads=2,head_dim=4,vocab=512")
MakeCluster = Callable[..., Any]
make_model = partial(ArithmeticModel, CONFIG)


@lru_cache
def all_expected(prompt: tuple[int, ...]) -> list[int]:
    return expected_tokens(CONFIG, prompt, 40)


def expected(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    return all_expected(prompt)[:num_tokens]


def settle(cluster: Any, rng: random.Random) -> None:
    """Play the other side's part, in any order, until every request has ended."""
    for _ in range(3000):
        if cluster.scheduler.is_idle:
            cluster.step()
            return
        cluster.step()
        for key in sorted(cluster.opened):
            if rng.random() < 0.5:
                continue
            if key in cluster.closing:
                cluster.close(key)
            elif key not in cluster.is_open:
                cluster.land_garbage(key)
                cluster.open(key)
            elif cluster.wants_local[key]:
                cluster.compute_here(key)
            else:
                cluster.commit(key)
    raise AssertionError("some request never ends")


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(
    ("block_size", "num_blocks", "swapped"),
    [(1, 90, 1000), (4, 22, 1000), (8, 12, 0), (16, 7, 1000)],
)
def test_tokens_are_those_of_the_reference(
    make_cluster: MakeCluster,
    make_ranks: Any,
    tp_size: int,
    block_size: int,
    num_blocks: int,
    swapped: int,
) -> None:
    rng = random.Random(f"{tp_size} {block_size}")
    with make_ranks(make_model, tp_size, (num_blocks, block_size)) as ranks:
        cluster = make_cluster(
            num_blocks,
            block_size,
            token_budget=24,
            max_num_sequences=6,
            max_swapped_blocks=swapped,
            rank=ranks,
            expected=expected,
        )
        cluster.wants_local = {}
        history = tuple(rng.randrange(256) for _ in range(60))
        for index in range(14):
            own = tuple(rng.randrange(256) for _ in range(rng.randrange(1, 20)))
            prompt = (*history[: rng.choice([0, 17, 32])], *own)
            key = cluster.reserve(f"r{index}", prompt, rng.randrange(1, 30), temperature=0.0)
            cluster.wants_local[key] = rng.random() < 0.5
        settle(cluster, rng)
        for key, message in cluster.requests.items():
            assert len(cluster.outputs[key]) == message.sampling.max_tokens
        counters = cluster.scheduler.load().counters
        assert counters["preemptions_total"] > 0, "the pool was meant to be too small"
        assert counters["cached_tokens_total"] > 0, "prompts were meant to share a prefix"
        cluster.assert_empty()


def test_long_prompt_in_chunks_beside_a_decoding_sequence(
    make_cluster: MakeCluster, make_ranks: Any
) -> None:
    with make_ranks(make_model, 1, (64, 8)) as ranks:
        cluster = make_cluster(64, 8, token_budget=9, rank=ranks, expected=expected)
        first = cluster.reserve("a", (1, 2, 3), 30, temperature=0.0)
        cluster.compute_here(first)
        cluster.step()
        second = cluster.reserve("b", tuple(range(100)), 3, temperature=0.0)
        cluster.compute_here(second)
        cluster.run()
        assert (len(cluster.outputs[first]), len(cluster.outputs[second])) == (30, 3)
        cluster.assert_empty()


@pytest.mark.parametrize("num_earlier", [0, 1, 3])
def test_the_next_token_depends_on_the_same_in_every_attempt(num_earlier: int) -> None:
    sampling = SamplingParams(max_tokens=9, seed=5, presence_penalty=1.0, repetition_penalty=1.1)
    prompt, output = (4, 5, 6), (7, 8, 9, 7)
    reserve = Reserve("a", 1, (*prompt, *output[:num_earlier]), sampling, "", num_earlier)
    sequence = Sequence.of(reserve, 0, 0.0, "model")
    sequence.output_token_ids += output[num_earlier:]
    row = sampling_row(sequence)
    assert (row.index, row.params) == (4, sampling)
    assert (tuple(row.prompt_token_ids), tuple(row.output_token_ids)) == (prompt, output)
