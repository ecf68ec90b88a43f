"""Checkpoints with random weights: tiny ones for tests, and the model that is benchmarked.

``write_checkpoint`` has transformers write its own model class, so that a test compares with what
others would load. ``python -m bench.checkpoint DIR --shape bench`` needs no transformers: it writes
a Llama of 152M parameters, the same bytes each time.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.tokenizer_file import MIN_VOCAB, special_token_ids, write_tokenizer

CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
}
SHAPES: dict[str, dict[str, Any]] = {
    "bench": {
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 2816,
        "vocab_size": 8192,
        "max_position_embeddings": 65536,
        "dtype": "bfloat16",
    },
    "demo": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 1408,
        "vocab_size": 8192,
        "max_position_embeddings": 65536,
        "dtype": "bfloat16",
    },
    "small": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "intermediate_size": 704,
        "vocab_size": 2048,
        "max_position_embeddings": 16384,
        "dtype": "bfloat16",
    },
}


def write_checkpoint(  # noqa: PLR0913 - a model has that many sizes
    path: Path,
    *,
    family: str,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    ffn: int,
    vocab: int,
    dtype: str,
    seed: int,
    **overrides: Any,  # noqa: ANN401 - fields of transformers' configuration classes
) -> None:  # fmt: skip
    """Have transformers write a random checkpoint, with a tokenizer when the vocabulary allows.

    Every weight, bias and norm is drawn, large enough that attention is peaked and that no two
    logits nearly tie: a wrong key anywhere changes the next token.

    Args:
        path: the folder, made if missing.
        family: "llama", "mistral", "qwen2" or "qwen3".
        dtype: "float32" or "bfloat16", of the stored weights.
        overrides: further fields of the configuration, such as ``rope_scaling`` or ``head_dim``.
    """
    import transformers

    config_class, model_class = (getattr(transformers, name) for name in CLASSES[family])
    fields: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    if family != "qwen2":
        fields["head_dim"] = hidden // heads
    if family == "mistral":
        fields["sliding_window"] = None
    if vocab >= MIN_VOCAB:
        ids = special_token_ids(vocab)
        fields |= {"bos_token_id": ids["<|bos|>"]}
        fields |= {"eos_token_id": [ids["<|eos|>"], ids["<|im_end|>"]]}
    else:
        fields |= {"bos_token_id": None, "eos_token_id": None}
    model = model_class(config_class(**{**fields, **overrides})).to(getattr(torch, dtype))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_drawn(name, parameter.shape, generator))
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    if vocab >= MIN_VOCAB:
        write_tokenizer(path, vocab)


def write_llama(path: Path, shape: dict[str, Any], seed: int = 0) -> None:
    """Write a Llama checkpoint and its tokenizer without transformers.

    Args:
        path: the folder, made if missing.
        shape: fields of config.json, as in :data:`SHAPES`.
        seed: of the weights; the same seed gives the same bytes.
    """
    path.mkdir(parents=True, exist_ok=True)
    ids = special_token_ids(shape["vocab_size"])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": ids["<|bos|>"],
        "eos_token_id": [ids["<|eos|>"], ids["<|im_end|>"]],
        **shape,
    }
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, shape["dtype"])
    tensors = {
        name: _drawn(name, extent, generator).to(dtype) for name, extent in _llama_tensors(shape)
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tokenizer(path, shape["vocab_size"])


def _llama_tensors(shape: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    hidden, ffn, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    query = shape["num_attention_heads"] * shape["head_dim"]
    key = shape["num_key_value_heads"] * shape["head_dim"]
    layer: list[tuple[str, tuple[int, ...]]] = [
        ("input_layernorm.weight", (hidden,)),
        ("self_attn.q_proj.weight", (query, hidden)),
        ("self_attn.k_proj.weight", (key, hidden)),
        ("self_attn.v_proj.weight", (key, hidden)),
        ("self_attn.o_proj.weight", (hidden, query)),
        ("post_attention_layernorm.weight", (hidden,)),
        ("mlp.gate_proj.weight", (ffn, hidden)),
        ("mlp.up_proj.weight", (ffn, hidden)),
        ("mlp.down_proj.weight", (hidden, ffn)),
    ]
    tensors: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (vocab, hidden))]
    for index in range(shape["num_hidden_layers"]):
        tensors += [(f"model.layers.{index}.{name}", extent) for name, extent in layer]
    return [*tensors, ("model.norm.weight", (hidden,)), ("lm_head.weight", (vocab, hidden))]


def _drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Weights that keep activations near 1 in size; q and k are twice that, for peaked scores."""
    drawn = torch.randn(shape, generator=generator)
    if "norm" in name:
        return drawn.mul_(0.1).add_(1.0)
    if name.endswith(".bias"):
        return drawn.mul_(0.2)
    if "embed_tokens" in name:
        return drawn
    scale = 1.5 if ("q_proj" in name or "k_proj" in name) else 1.0
    return drawn.mul_(scale * shape[-1] ** -0.5)


def main() -> None:
    """``python -m bench.checkpoint DIR [--shape bench]``."""
    parser = argparse.ArgumentParser(prog="bench.checkpoint", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="bench")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_llama(arguments.folder, SHAPES[arguments.shape], arguments.seed)
    print(arguments.folder)


if __name__ == "__main__":
    main()
