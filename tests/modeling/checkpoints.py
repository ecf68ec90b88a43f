"""Tiny checkpoints that transformers itself writes: a test compares with what others would load."""

from pathlib import Path
from typing import Any

import torch

from bench.checkpoint import drawn
from bench.tokenizer_file import MIN_VOCAB, special_token_ids, write_tokenizer

CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
}


def write_checkpoint(
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
    **overrides: Any,
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
            parameter.copy_(drawn(name, parameter.shape, generator))
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    if vocab >= MIN_VOCAB:
        write_tokenizer(path, vocab)
