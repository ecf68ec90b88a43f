"""A small random Llama, served by scheduler and runners, against transformers' greedy tokens."""

import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling.loader import load_model
from modeling.model import Model
from modeling.parallel import TensorParallel
from tests.modeling.checkpoints import write_checkpoint

VOCAB_SIZE = 131


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    sizes = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 96, "vocab": VOCAB_SIZE}
    write_checkpoint(path, family="llama", dtype="float32", seed=5, **sizes)
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' own making
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @lru_cache
    def generate(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
        tokens = list(prompt)
        with torch.inference_mode():
            for _ in range(num_tokens):
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        return tokens[len(prompt) :]

    return generate


@pytest.mark.parametrize("tp_size", [1, 2])
def test_greedy_tokens_equal_those_of_transformers(
    make_cluster: Any, make_ranks: Any, folder: Path, expected: Any, tp_size: int
) -> None:
    def make_model(tp: TensorParallel) -> Model:
        return load_model(str(folder), tp=tp, dtype="float32", device="cpu")

    with make_ranks(make_model, tp_size, (7, 16)) as ranks:
        cluster = make_cluster(7, 16, token_budget=32, rank=ranks, expected=expected)
        prompts = [
            tuple((i * 37 + j * j) % VOCAB_SIZE for i in range(14 + 9 * j)) for j in range(4)
        ]
        for index, prompt in enumerate((*prompts, (*prompts[3], 5))):
            key = cluster.reserve(f"r{index}", prompt, 24, temperature=0.0)
            if index % 2:
                cluster.compute_here(key)
        while not cluster.scheduler.is_idle:
            cluster.step()
            for key in sorted(cluster.opened):
                cluster.open(key)
                cluster.commit(key)
        cluster.run()
        assert {len(output) for output in cluster.outputs.values()} == {24}
        assert cluster.scheduler.load().counters["preemptions_total"] > 0
        cluster.assert_empty()
