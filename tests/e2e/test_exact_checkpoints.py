"""Real checkpoints over HTTP: fp32 greedy tokens equal those of ``transformers``.

Every shape of cluster runs here with one family; the whole matrix runs in ``make test-all``.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.cluster import run_cluster
from tests.modeling.checkpoints import write_checkpoint

SHAPES = {
    "tp1": ("--decode", "tp1"),
    "tp2": ("--decode", "tp2"),
    "cp1-tp1": ("--prefill", "cp1", "--decode", "tp1"),
    "cp2-tp1": ("--prefill", "cp2", "--decode", "tp1"),
    "cp2-tp2": ("--prefill", "cp2", "--decode", "tp2"),
    "cp4-tp2": ("--prefill", "cp4", "--decode", "tp2"),
    "cp2tp2-tp2": ("--prefill", "cp2tp2", "--decode", "tp2"),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0}
              | {"high_freq_factor": 4.0, "original_max_position_embeddings": 256}},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 96},
}  # fmt: skip
EVERY_CHANGE = {
    ("tp1", "llama"),
    ("tp2", "qwen3"),
    ("cp1-tp1", "mistral"),
    ("cp2-tp1", "qwen2"),
    ("cp2-tp2", "llama"),
    ("cp4-tp2", "qwen3"),
    ("cp2tp2-tp2", "mistral"),
}
NUM_TOKENS = 8
Checkpoint = Callable[[str], Path]
Reference = Callable[[str, list[int]], list[int]]
LENGTHS = (1, 17, 64, 130, 420)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A function: the folder of a family's tiny checkpoint, written once."""
    written: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in written:
            path = tmp_path_factory.mktemp(family)
            write_checkpoint(
                path, family=family, hidden=64, layers=3, heads=8, kv_heads=4, ffn=96, vocab=320,
                dtype="float32", seed=3, **FAMILIES[family],
            )  # fmt: skip
            written[family] = path
        return written[family]

    return folder


@pytest.fixture(scope="session")
def reference(checkpoint: Checkpoint) -> Reference:
    """A function: transformers' greedy tokens, and the margin of the closest decision."""
    from transformers import AutoModelForCausalLM

    models: dict[str, Any] = {}

    def greedy(family: str, prompt: list[int]) -> list[int]:
        if family not in models:
            models[family] = AutoModelForCausalLM.from_pretrained(
                checkpoint(family), dtype=torch.float32, attn_implementation="eager"
            ).eval()
        token_ids = list(prompt)
        with torch.inference_mode():
            for _ in range(NUM_TOKENS):
                logits = models[family](torch.tensor([token_ids])).logits[0, -1]
                token_ids.append(int(logits.argmax()))
        return token_ids[len(prompt) :]

    return greedy


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("shape", "family"),
    [
        pytest.param(
            shape,
            family,
            marks=() if (shape, family) in EVERY_CHANGE else pytest.mark.slow,
        )
        for shape in SHAPES
        for family in FAMILIES
    ],
)
def test_greedy_tokens_equal_transformers(
    shape: str, family: str, checkpoint: Checkpoint, reference: Reference
) -> None:
    rng = random.Random(f"{shape} {family}")
    flags = (
        *SHAPES[shape],
        *("--dtype", "float32", "--block-size", "16", "--kv-memory", "32MiB"),
        *("--checksum", "always", "--set", "prefill_pool.chunk_tokens=128"),
        *("--set", "decode_pool.token_budget=96"),
        *("--set", "coordinator.local_prefill_threshold=0"),
    )
    with run_cluster(str(checkpoint(family)), *flags) as cluster:
        for length in LENGTHS:
            prompt = [rng.randrange(5, 300) for _ in range(length)]
            want = reference(family, prompt)
            assert cluster.tokens(prompt, NUM_TOKENS) == want, f"cold, {length} tokens"
            assert cluster.tokens(prompt, NUM_TOKENS) == want, f"cached, {length} tokens"
            longer = prompt + [rng.randrange(5, 300) for _ in range(21)]
            assert cluster.tokens(longer, NUM_TOKENS) == reference(family, longer)
        cluster.assert_no_leaks()
