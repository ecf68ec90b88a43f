"""Checkpoints with random weights: the models that are benchmarked, and small ones.

    python -m bench.checkpoint DIR [--shape bench] [--seed 0]

The default is a Llama of 152M parameters, the same bytes each time.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.tokenizer_file import special_token_ids, write_tokenizer

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
        name: drawn(name, extent, generator).to(dtype) for name, extent in _llama_tensors(shape)
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


def drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Weights that keep activations near 1 in size; q and k are twice that, for peaked scores."""
    weights = torch.randn(shape, generator=generator)
    if "norm" in name:
        return weights.mul_(0.1).add_(1.0)
    if name.endswith(".bias"):
        return weights.mul_(0.2)
    if "embed_tokens" in name:
        return weights
    scale = 1.5 if ("q_proj" in name or "k_proj" in name) else 1.0
    return weights.mul_(scale * shape[-1] ** -0.5)


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
