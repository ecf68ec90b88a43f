"""What decides how a checkpoint is served, and that what nothing reads is told or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.checkpoint import write_llama
from modeling.checkpoint.config import load_config
from modeling.checkpoint.tensors import grouped
from modeling.facts import CheckpointFacts, describe_checkpoint, with_facts
from modeling.text.template_sources import load_chat_template
from modeling.text.tokenizer import load_tokenizer
from protocol.errors import ConfigError

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "dtype": "float16",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_llama(tmp_path, SHAPE)
    return tmp_path


def _facts(path_or_name: str | Path) -> CheckpointFacts:
    name = str(path_or_name)
    tokenizer = load_tokenizer(name)
    template = load_chat_template(name, tokenizer.special_tokens)
    return describe_checkpoint(name, load_config(name), tokenizer, template)


def _change(path: Path, **fields: Any) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**data, **fields}))


def _add(folder: Path, *names: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    extra = {name: torch.ones(4) for name in names}
    save_file({**tensors, **extra}, folder / "model.safetensors")


def test_stop_tokens_are_the_union_of_three_files(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    ids = {text: tokenizer.encode(text)[-1] for text in ("<|bos|>", "<|eos|>", "<|im_end|>")}
    _change(folder / "config.json", eos_token_id=ids["<|eos|>"])
    _change(folder / "generation_config.json", eos_token_id=[5, ids["<|eos|>"], 9999])
    _change(folder / "tokenizer_config.json", eos_token="<|im_end|>")
    facts = _facts(folder)
    assert [(stop.token_id, stop.text, stop.sources) for stop in facts.stop_tokens] == [
        (ids["<|eos|>"], "<|eos|>", ("config.json", "generation_config.json")),
        (5, tokenizer.token(5), ("generation_config.json",)),
        (ids["<|im_end|>"], "<|im_end|>", ("tokenizer",)),
    ]
    assert with_facts(load_config(str(folder)), facts).eos_token_ids == (
        *(ids["<|eos|>"], 5, ids["<|im_end|>"]),
    )
    assert facts.notes == (
        "generation_config.json names the stop token 9999, which is beyond the vocabulary of 300",
    )


def test_where_the_sampling_defaults_are_from(folder: Path) -> None:
    _change(folder / "generation_config.json", temperature=0.6)
    _change(folder / "config.json", temperature=0.3)
    facts = _facts(folder)
    assert (facts.sampling, facts.sampling_from) == ({"temperature": 0.6}, "generation_config.json")
    (folder / "generation_config.json").unlink()
    facts = _facts(folder)
    assert (facts.sampling, facts.sampling_from) == ({"temperature": 0.3}, "config.json")
    assert all(stop.sources[0] == "config.json" for stop in facts.stop_tokens)


def test_the_eos_of_special_tokens_map_counts(folder: Path) -> None:
    _change(folder / "config.json", eos_token_id=None)
    (folder / "tokenizer_config.json").write_text("{}")
    eos = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False}
    _change(folder / "special_tokens_map.json", eos_token=eos)
    assert [(stop.text, stop.sources) for stop in _facts(folder).stop_tokens] == [
        ("<|im_end|>", ("tokenizer",))
    ]


def test_the_head_is_told(folder: Path) -> None:
    assert _facts(folder).head == "stored"
    assert _facts(folder).stored_dtype == "float16"
    _change(folder / "config.json", tie_word_embeddings=True)
    assert _facts(folder).head == "stored, though config.json ties it"
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors")
    assert _facts(folder).head == "tied to the embedding"
    del tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    assert _facts(folder).head == "stored, and the embedding tied to it"
    _change(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(ConfigError, match=r"tensor model\.embed_tokens\.weight is missing"):
        _facts(folder)


def test_what_nothing_reads_is_told(folder: Path) -> None:
    _add(
        folder,
        *(f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)),
        *(f"model.layers.{layer}.self_attn.q_norm.weight" for layer in range(2)),
        *("model.layers.2.mlp.up_proj.weight", "score.weight"),
    )
    unread = _facts(folder).unread_tensors
    assert grouped(unread) == (
        "model.layers.*.self_attn.q_norm.weight (2), model.layers.*.mlp.up_proj.weight, "
        "score.weight"
    )
    assert grouped(tuple("abcdef")) == "a, b, c, d, 2 more"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("model.layers.0.mlp.up_proj.weight_scale", "belongs to quantised weights"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "belongs to quantised weights"),
        ("model.layers.0.mlp.up_proj.qweight", "belongs to quantised weights"),
        ("model.layers.0.mlp.up_proj.g_idx", "belongs to quantised weights"),
        ("model.layers.0.mlp.up_proj.input_scale", "belongs to quantised weights"),
        ("layers.0.mlp.up_proj.weight.absmax", "belongs to quantised weights"),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "quantised weights"),
        ("model.layers.0.self_attn.k_scale", "belongs to quantised weights"),
        ("model.layers.0.self_attn.q_proj.bias", "says the model does not have"),
        ("model.layers.0.mlp.down_proj.bias", "says the model does not have"),
        ("lm_head.bias", "says the model does not have"),
        ("model.norm.bias", "says the model does not have"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "is of an adapter"),
    ],
)
def test_what_would_change_the_answers_is_refused(folder: Path, name: str, problem: str) -> None:
    _add(folder, name)
    with pytest.raises(ConfigError, match=problem) as caught:
        _facts(folder)
    assert name.removeprefix("model.") in str(caught.value)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_missing_or_misshapen_tensor_is_refused(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: torch.ones(3, 4)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"{name} has shape \[3, 4\], config.json asks for"):
        _facts(folder)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=f"tensor {name} is missing"):
        _facts(folder)


def test_tokens_beyond_the_vocabulary_are_told(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:290].clone()
    save_file(tensors, folder / "model.safetensors")
    _change(folder / "config.json", vocab_size=290, eos_token_id=3)
    facts = _facts(folder)
    assert facts.notes[-1].startswith("10 tokens of the tokenizer are beyond the model's")
    assert [stop.token_id for stop in facts.stop_tokens] == [3]


def test_the_arithmetic_model() -> None:
    facts = _facts("arithmetic")
    assert [(stop.text, stop.sources) for stop in facts.stop_tokens] == [
        ("<|eos|>", ("built in", "tokenizer"))
    ]
    assert (facts.head, facts.template) == ("built in", "built in")
