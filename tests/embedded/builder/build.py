"""``python -m tests.embedded.builder.build [DIR]``: make the embedded model again, from a seed."""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from modeling.embedded import CHECKPOINT
from modeling.embedded.lexicon import SPECIAL_TOKENS
from tests.embedded.builder.circuit import (
    FFN,
    HIDDEN,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    Circuit,
    train_codes,
)
from tests.embedded.builder.kernels import HEAD_DIM, MAX_DISTANCE, ROPE_THETA
from tests.embedded.builder.vocabulary import build_vocabulary, write_tokenizer

MAX_MODEL_LEN = 131_072
assert MAX_MODEL_LEN <= MAX_DISTANCE


def build(folder: Path, seed: int) -> None:
    """Write config.json, model.safetensors and the tokenizer's files into a folder.

    Args:
        folder: made if missing.
        seed: of every code; the same seed gives the same model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = build_vocabulary()
    circuit = Circuit(vocabulary, train_codes(vocabulary, seed))
    save_file(circuit.tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    bos, end, *_ = (vocabulary.ids[token] for token in SPECIAL_TOKENS)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(vocabulary.tokens),
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": ROPE_THETA,
        "max_position_embeddings": MAX_MODEL_LEN,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": bos,
        "eos_token_id": end,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tokenizer(folder, vocabulary)


def main() -> None:
    """Build the checkpoint that is shipped, or another one elsewhere."""
    parser = argparse.ArgumentParser(prog="tests.embedded.builder.build", description=main.__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=CHECKPOINT)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the same order of additions everywhere
    build(arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()
