"""config.json of every family and spelling; what is not understood is refused in one line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from modeling.checkpoint.config import ModelConfig, load_config
from modeling.checkpoint.rope_config import RopeConfig
from protocol.errors import ConfigError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "dtype": "bfloat16",
}


def _folder(path: Path, fields: dict[str, Any]) -> Path:
    """A checkpoint folder whose one tensor nobody reads."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(fields))
    save_file({"x": torch.arange(6.0)}, path / "model.safetensors")
    return path


def _load(path: Path, **changes: Any) -> ModelConfig:
    fields = {name: value for name, value in {**LLAMA, **changes}.items() if value != "absent"}
    return load_config(str(_folder(path, fields)))


def test_the_plain_case(tmp_path: Path) -> None:
    config = _load(tmp_path, eos_token_id=[7, 9, 700], bos_token_id=1)
    assert config.architecture == "llama"
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (3, 8, 2)
    assert (config.head_dim, config.max_model_len) == (8, 1024)
    assert config.layer_windows == (None, None, None)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (7, 9))
    assert not (config.attention_bias or config.mlp_bias or config.qk_norm)
    assert config.rope == RopeConfig(theta=10_000.0)
    assert config.dtype == "bfloat16"
    assert len(config.fingerprint) == 32


def test_both_rope_spellings_agree(tmp_path: Path) -> None:
    llama3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    llama3["original_max_position_embeddings"] = 256
    old = _load(tmp_path, rope_theta=5e5, rope_scaling={"type": "llama3", **llama3})
    new = _load(tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **llama3})
    assert old.rope == new.rope
    assert (old.rope.theta, old.rope.factor, old.rope.original_max_len) == (5e5, 8.0, 256)


def test_both_rope_spellings_may_say_the_same(tmp_path: Path) -> None:
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    for old in ({"type": "linear", "factor": 2}, {"rope_type": "linear"}, {}, None):
        both = _load(tmp_path, rope_parameters=new, rope_scaling=old, rope_theta=500_000)
        assert both == _load(tmp_path, rope_parameters=new)


def test_yarn_without_a_factor_takes_the_ratio(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 256, "rope_theta": 1e4}
    assert _load(tmp_path, rope_parameters=yarn).rope.factor == 4.0


@pytest.mark.parametrize(
    ("architecture", "changes", "windows"),
    [
        ("MistralForCausalLM", {}, (4096,) * 3),  # absent is not null: transformers' default
        ("MistralForCausalLM", {"sliding_window": None}, (None,) * 3),
        ("MistralForCausalLM", {"sliding_window": 64}, (64,) * 3),
        ("Qwen2ForCausalLM", {"sliding_window": 64}, (None,) * 3),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
            (None, None, 64),
        ),
        (
            "Qwen3ForCausalLM",
            {
                "use_sliding_window": True,
                "sliding_window": 32,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (32, None, 32),
        ),
        ("LlamaForCausalLM", {"sliding_window": 64}, (None,) * 3),
    ],
)
def test_windows(
    architecture: str, changes: dict[str, Any], windows: tuple[int | None, ...], tmp_path: Path
) -> None:
    config = _load(tmp_path, architectures=[architecture], **changes)
    assert config.layer_windows == windows


def test_what_each_family_hard_codes(tmp_path: Path) -> None:
    qwen2 = _load(tmp_path, architectures=["Qwen2ForCausalLM"], attention_bias=False)
    assert (qwen2.attention_bias, qwen2.attention_output_bias) == (True, False)
    qwen3 = _load(tmp_path, architectures=["Qwen3ForCausalLM"], attention_bias=True)
    assert (qwen3.attention_bias, qwen3.attention_output_bias) == (True, True)
    assert (qwen3.qk_norm, qwen3.head_dim) == (True, 128)
    mistral = _load(tmp_path, architectures=["MistralForCausalLM"], attention_bias=True)
    assert (mistral.attention_bias, mistral.attention_output_bias) == (False, False)
    assert _load(tmp_path, num_key_value_heads="absent").num_kv_heads == 8


def test_eos_ids_of_both_files(tmp_path: Path) -> None:
    _folder(tmp_path, LLAMA)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 2]}')
    assert _load(tmp_path, eos_token_id=2).eos_token_ids == (2, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"auto_map": {"AutoModel": "evil.Model"}, "architectures": ["EvilForCausalLM"]},
            "architectures names EvilForCausalLM; supported are LlamaForCausalLM, "
            "MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM; code of the checkpoint",
        ),
        ({"text_config": LLAMA}, "text_config makes this a model of more than text"),
        ({"rope_theta": float("inf")}, "rope_theta must be above 1 and finite, found inf"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be above 0 and finite, found nan"),
        ({"max_position_embeddings": float("inf")}, "max_position_embeddings must be an integer"),
        ({"max_position_embeddings": {"__float__": "Infinity"}}, "must be an integer, found inf"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures names GPT2LMHeadModel"),
        ({"architectures": "absent"}, "architectures names none"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"vocab_size": "many"}, "vocab_size must be an integer"),
        ({"vocab_size": 0}, "vocab_size must lie in 1"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers must lie in"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide 8"),
        ({"hidden_size": 63}, "hidden_size 63 is no multiple of 8 heads"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be above 0"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.rope_type 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor must lie in 1"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_theta": 0.5}, "rope_theta must be above 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1"),
        ({"rope_parameters": {"full_attention": {}}}, "differs between layer types"),
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
            },
            "rope_scaling and rope_parameters are both there, and differ in rope_type",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 1e6},
            "rope_theta and rope_parameters are both there, and differ in rope_theta",
        ),
        ({"dtype": "int8"}, "dtype 'int8' is not"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be token ids"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": "absent"},
            "num_key_value_heads is missing",
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "use_sliding_window": True,
                "layer_types": ["x"],
            },
            "layer_types must be",
        ),
    ],
)
def test_refusals_name_file_and_field(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, **changes)
    text = str(caught.value)
    assert str(tmp_path / "config.json") in text
    assert message in text
    assert "\n" not in text


def test_what_is_infinite_and_read_by_nobody_is_no_fault(tmp_path: Path) -> None:
    assert _load(tmp_path, swiglu_limit=float("inf"), other=float("nan")) == _load(tmp_path)


def test_no_folder_and_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        load_config(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        load_config(str(tmp_path))


def test_missing_dtypes_are_those_of_the_weights(tmp_path: Path) -> None:
    assert _load(tmp_path, dtype="absent", torch_dtype="float16").dtype == "float16"
    assert _load(tmp_path, dtype="absent").dtype == "float32"  # what the file holds


def test_code_of_the_checkpoint_is_not_needed_for_a_known_architecture(tmp_path: Path) -> None:
    plain = _load(tmp_path)
    assert _load(tmp_path, auto_map={"AutoModelForCausalLM": "evil.Model"}) == plain


def test_max_model_len(tmp_path: Path) -> None:
    _load(tmp_path)
    assert load_config(str(tmp_path), max_model_len=10).max_model_len == 10
    with pytest.raises(ConfigError, match="max_model_len 1025 is outside 1 to 1024"):
        load_config(str(tmp_path), max_model_len=1025)
    _load(tmp_path, rope_scaling={"type": "yarn", "factor": 4})
    assert load_config(str(tmp_path), max_model_len=4096).max_model_len == 4096
    with pytest.raises(ConfigError, match="outside 1 to 4096"):
        load_config(str(tmp_path), max_model_len=4097)


def test_the_fingerprint_is_of_what_is_computed(tmp_path: Path) -> None:
    """Not of the folder or the length served; but of the numbers and one changed weight."""
    first = _load(tmp_path / "a")
    assert _load(tmp_path / "b").fingerprint == first.fingerprint
    assert load_config(str(tmp_path / "a"), max_model_len=9).fingerprint == first.fingerprint
    assert _load(tmp_path / "b", rms_norm_eps=1e-5).fingerprint != first.fingerprint
    changed = torch.arange(6.0)
    changed[3] = 9.0
    save_file({"x": changed}, tmp_path / "a" / "model.safetensors")
    assert load_config(str(tmp_path / "a")).fingerprint != first.fingerprint


def test_arithmetic() -> None:
    config = load_config("arithmetic")
    assert (config.architecture, config.dtype, config.vocab_size) == ("arithmetic", "float32", 512)
    other = load_config("arithmetic:layers=2,heads=8,kv_heads=4,vocab=300,max_len=100")
    assert (other.num_layers, other.num_heads, other.num_kv_heads) == (2, 8, 4)
    assert (other.vocab_size, other.max_model_len) == (300, 100)
    assert other.fingerprint != config.fingerprint
    for bad in ("arithmetic:layers", "arithmetic:layers=x", "arithmetic:depth=3"):
        with pytest.raises(ConfigError, match="is not KEY=NUMBER"):
            load_config(bad)
    with pytest.raises(ConfigError, match="vocab must be at least"):
        load_config("arithmetic:vocab=10")
    with pytest.raises(ConfigError, match="cannot share 3 KV heads"):
        load_config("arithmetic:heads=4,kv_heads=3")


def test_what_the_coordinator_imports_is_free_of_torch() -> None:
    code = (
        "import sys, modeling.checkpoint.config, modeling.text.chat_template\n"
        "import modeling.text.tokenizer\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
