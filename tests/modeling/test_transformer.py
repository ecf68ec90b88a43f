"""The transformer against transformers, for checkpoints that transformers itself wrote."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from modeling.checkpoint.config import load_config
from modeling.checkpoint.rope_config import RopeConfig
from modeling.loader import load_model
from modeling.parallel import SingleRank, TensorParallel
from modeling.rope import Rope, channel_order, frequencies, rotate
from protocol.errors import ConfigError
from tests.modeling.checkpoints import write_checkpoint
from tests.sizes import some_of

SIZES = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 96, "vocab": 131}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SLIDING = {"use_sliding_window": True, "sliding_window": 7}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mha": ("llama", {"kv_heads": 4}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-head-dim": ("llama", {"head_dim": 24}),
    "llama-theta": ("llama", {"rope_theta": 1e6}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}),
    "llama-dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama-llama3": ("llama", {"rope_scaling": LLAMA3}),
    "llama-yarn": ("llama", {"rope_scaling": YARN}),
    "llama-yarn-factor": ("llama", {"rope_scaling": {**YARN, "attention_factor": 0.8}}),
    "llama-yarn-beta": ("llama", {"rope_scaling": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}}),
    "llama-yarn-mscale": (
        "llama",
        {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    ),
    "llama-yarn-exact": ("llama", {"rope_scaling": {**YARN, "truncate": False}}),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 9}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {**SLIDING, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-biases": ("qwen3", {"attention_bias": True}),
    "qwen3-layer-types": (
        "qwen3",
        {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}
NUM_TOKENS = 41


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function: the folder of a variant's checkpoint, written once."""
    written: dict[tuple[str, str], Path] = {}

    def folder(variant: str, dtype: str = "float32") -> Path:
        if (variant, dtype) not in written:
            family, changes = VARIANTS[variant]
            path = tmp_path_factory.mktemp(variant)
            write_checkpoint(path, family=family, dtype=dtype, seed=5, **{**SIZES, **changes})
            written[variant, dtype] = path
        return written[variant, dtype]

    return folder


def _reference(folder: Path, input_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' own making
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        )
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(input_ids[None]).logits[0].float()
    return logits


def _logits(folder: Path, input_ids: torch.Tensor, context: Any, **options: Any) -> torch.Tensor:
    tp: TensorParallel = options.pop("tp", SingleRank())
    config = load_config(str(folder))
    model = load_model(str(folder), tp=tp, dtype=options.get("dtype", "float32"), device="cpu")
    attention = context(config.layer_windows)
    outputs = []
    start = 0
    for length in options.get("chunks", (len(input_ids),)):
        positions = torch.arange(start, start + length)
        hidden = model.forward(input_ids[start : start + length], positions, attention)
        outputs.append(model.logits(hidden))
        start += length
    assert attention.layers_done == list(range(config.num_layers)) * len(outputs)
    return torch.cat(outputs)


def _prompt() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(SIZES["vocab"], (NUM_TOKENS,), generator=generator)


def _as_base_model(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def _as_wrapped_model(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


def _without_embedding(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    del tensors["model.embed_tokens.weight"]
    return tensors


@pytest.mark.parametrize(
    ("is_tied", "change"),
    [
        (True, dict),  # config.json ties what the checkpoint has twice, differently
        (True, _without_embedding),
        (False, _as_base_model),
        (False, _as_wrapped_model),
    ],
)
def test_tensors_that_are_stored_otherwise_are_read_as_transformers_does(
    is_tied: bool, change: Any, checkpoint: Any, tmp_path: Path, dense_attention: Any
) -> None:
    shutil.copytree(checkpoint("llama"), tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields |= {"tie_word_embeddings": is_tied, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    weights = tmp_path / "model.safetensors"
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    expected = _reference(tmp_path, _prompt(), torch.float32)
    logits = _logits(tmp_path, _prompt(), dense_attention)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, checkpoint: Any, dense_attention: Any) -> None:
    folder = checkpoint(variant)
    expected = _reference(folder, _prompt(), torch.float32)
    logits = _logits(folder, _prompt(), dense_attention)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["llama-yarn", "mistral-window", "qwen3"])
def test_chunks_equal_the_whole(variant: str, checkpoint: Any, dense_attention: Any) -> None:
    folder = checkpoint(variant)
    whole = _logits(folder, _prompt(), dense_attention)
    pieces = _logits(folder, _prompt(), dense_attention, chunks=(16, 1, 1, 20, 3))
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "variant",
    ["llama-biases", "llama-tied", "llama-mha", "qwen2", "qwen3-biases", "mistral-window"],
)
def test_shards_equal_the_whole(
    variant: str, checkpoint: Any, dense_attention: Any, as_ranks: Any
) -> None:
    folder = checkpoint(variant)
    expected = _logits(folder, _prompt(), dense_attention)
    sizes = (2, 4) if variant == "llama-mha" else (2,)
    for size in sizes:  # a vocabulary of 131 leaves the last rank a shorter share
        ranks = as_ranks(size, lambda tp: _logits(folder, _prompt(), dense_attention, tp=tp))
        for logits in ranks:
            assert torch.equal(logits, ranks[0])
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_bfloat16_stays_close(variant: str, checkpoint: Any, dense_attention: Any) -> None:
    """No farther from fp32 than transformers' own bf16 is, give or take a third."""
    folder = checkpoint(variant, "bfloat16")
    exact = _reference(folder, _prompt(), torch.float32)
    theirs = _reference(folder, _prompt(), torch.bfloat16)
    ours = _logits(folder, _prompt(), dense_attention, dtype="auto")
    assert (ours - exact).norm() <= 1.33 * (theirs - exact).norm()


def test_rows_do_not_depend_on_the_batch(checkpoint: Any) -> None:
    """A token's linears give the same bits whatever else is in the batch."""
    model: Any = load_model(
        str(checkpoint("llama")), tp=SingleRank(), dtype="float32", device="cpu"
    )
    hidden = torch.randn(64, SIZES["hidden"], generator=torch.Generator().manual_seed(2))
    together = model.logits(hidden)
    for rows in (1, 2, 7, 16, 33):
        assert torch.equal(model.logits(hidden[:rows]), together[:rows])


def test_degree_must_divide_the_heads(checkpoint: Any, as_ranks: Any) -> None:
    def load(tp: TensorParallel) -> None:
        load_model(str(checkpoint("llama")), tp=tp, dtype="auto", device="cpu")

    with pytest.raises(ConfigError, match="tp4 does not divide the model's 2 KV heads"):
        as_ranks(4, load)
    with pytest.raises(ConfigError, match="tp3 does not divide the model's 4 attention heads"):
        as_ranks(3, load)


def test_unknown_dtype(checkpoint: Any) -> None:
    with pytest.raises(ConfigError, match="'int8' is not one of auto, bfloat16, float16"):
        load_model(str(checkpoint("llama")), tp=SingleRank(), dtype="int8", device="cpu")


def test_dynamic_ntk_beyond_the_original_length(dense_attention: Any, tmp_path: Path) -> None:
    """At the length it was made for, the static base equals transformers' recomputed one."""
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    write_checkpoint(
        tmp_path, family="llama", dtype="float32", seed=5, rope_scaling=scaling,
        max_position_embeddings=24, **SIZES,
    )  # fmt: skip
    expected = _reference(tmp_path, _prompt(), torch.float32)
    config = load_config(str(tmp_path), max_model_len=NUM_TOKENS)
    assert config.max_model_len == NUM_TOKENS
    assert config.fingerprint != load_config(str(tmp_path)).fingerprint
    model = load_model(
        str(tmp_path), tp=SingleRank(), dtype="auto", device="cpu", max_model_len=NUM_TOKENS
    )
    hidden = model.forward(
        _prompt(), torch.arange(NUM_TOKENS), dense_attention(config.layer_windows)
    )
    torch.testing.assert_close(model.logits(hidden), expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=some_of(50))
@given(
    head_dim=st.sampled_from([2, 8, 64, 128]),
    start=st.integers(0, 100_000),
    shift=st.integers(0, 1000),
)
def test_rope_scores_depend_on_distance_alone(head_dim: int, start: int, shift: int) -> None:
    rope = Rope(RopeConfig(theta=1e4), head_dim, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, head_dim, generator=torch.Generator().manual_seed(head_dim))

    def score(q_position: int, k_position: int) -> float:
        return float(
            rotate(q, rope.at(torch.tensor([q_position]))).flatten()
            @ rotate(k, rope.at(torch.tensor([k_position]))).flatten()
        )

    # Each angle is a position times a frequency, rounded to 24 bits: so much may the two be off.
    inv_freq, _ = frequencies(RopeConfig(theta=1e4), head_dim)
    lengths = q.reshape(-1, 2).norm(dim=-1) * k.reshape(-1, 2).norm(dim=-1)
    rounding = float((lengths * inv_freq).sum()) * (start + shift) * 2**-23
    near = score(shift, 0)
    assert score(start + shift, start) == pytest.approx(near, abs=rounding + 1e-4)


def test_rotation_pairs_the_halves_of_a_head() -> None:
    """Reordered, rotated and put back, a head equals the usual rotate-half formula."""
    head_dim, positions = 16, torch.tensor([0, 1, 77])
    x = torch.randn(3, 2, head_dim, generator=torch.Generator().manual_seed(0))
    order = channel_order(head_dim)
    rope = Rope(RopeConfig(), head_dim, torch.device("cpu"))
    rotated = torch.empty_like(x)
    rotated[..., order] = rotate(x[..., order], rope.at(positions))
    inv_freq, _ = frequencies(RopeConfig(), head_dim)
    angles = (positions[:, None] * inv_freq).repeat(1, 2)[:, None]
    half = torch.cat([-x[..., 8:], x[..., :8]], dim=-1)
    torch.testing.assert_close(rotated, x * angles.cos() + half * angles.sin())


def test_float16_is_served_as_it_is(checkpoint: Any, dense_attention: Any) -> None:
    folder = checkpoint("llama", "float16")
    expected = _reference(folder, _prompt(), torch.float32)
    logits = _logits(folder, _prompt(), dense_attention, dtype="float16")
    # eleven bits of mantissa: no more than a few in a thousand of the largest logit
    assert (logits - expected).abs().max() < 4e-3 * expected.abs().max()
