"""Which tensors of a checkpoint a model reads, and what becomes of the others. Torch-free.

A checkpoint that lacks one is refused, and so is one with a tensor that would have changed what is
computed: quantised weights beside their scales, a bias that config.json denies. Of the others only
those that everybody can compute (``rotary_emb.inv_freq``) are passed over in silence; the rest is
named where the server starts.
"""

import re
from collections import Counter
from collections.abc import Container, Mapping
from pathlib import Path

from modeling.checkpoint.config import ModelConfig
from modeling.checkpoint.folder import EMBEDDING, HEAD, ITEM_BYTES, TensorEntry
from modeling.families import tensor_names
from protocol.errors import ConfigError

_COMPUTABLE = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|qscales|scales|scale|g_idx|SCB|absmax|quant_map|nested_absmax|quant_state\..+"
    r"|weight_(scale|scale_inv|scale_2|packed|shape|zero_point|g_idx)|(input|output)_scale"
    r"|(k|v|q)_scale)$"
)
_ADAPTER = re.compile(r"\.lora_[A-Za-z]+(\.|$)|\.base_layer\.")


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a transformer reads, embedding and head among them."""
    names = tensor_names(config.architecture)
    hidden = config.hidden_size
    head_dim = config.head_dim
    query_rows = config.num_heads * head_dim
    key_rows = config.num_kv_heads * head_dim
    linears = (  # name, rows, columns, whether it has a bias
        (names.query, query_rows, hidden, config.attention_bias),
        (names.key, key_rows, hidden, config.attention_bias),
        (names.value, key_rows, hidden, config.attention_bias),
        (names.output, hidden, query_rows, config.attention_output_bias),
        (names.gate, config.intermediate_size, hidden, config.mlp_bias),
        (names.up, config.intermediate_size, hidden, config.mlp_bias),
        (names.down, hidden, config.intermediate_size, config.mlp_bias),
    )
    layer: dict[str, tuple[int, ...]] = {
        f"{names.attention_norm}.weight": (hidden,),
        f"{names.mlp_norm}.weight": (hidden,),
    }
    for name, rows, columns, has_bias in linears:
        layer[f"{name}.weight"] = (rows, columns)
        if has_bias:
            layer[f"{name}.bias"] = (rows,)
    if config.qk_norm:
        for name in (names.query_norm, names.key_norm):
            layer[f"{name}.weight"] = (head_dim,)
    vocabulary = (config.vocab_size, hidden)
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: vocabulary, HEAD: vocabulary}
    for index in range(config.num_layers):
        prefix = names.layer.format(index)
        tensors |= {f"{prefix}.{name}": shape for name, shape in layer.items()}
    tensors[f"{names.final_norm}.weight"] = (hidden,)
    return tensors


def tied_name(name: str, other: str, stored: Container[str], config: ModelConfig) -> str:
    """The tensor to read for ``name``, which config.json may tie to ``other``."""
    is_tied = config.tie_word_embeddings and name not in stored and other in stored
    return other if is_tied else name


def check_tensors(
    entries: Mapping[str, TensorEntry], config: ModelConfig, folder: Path
) -> tuple[str, ...]:
    """The names of the tensors that nothing reads and that cannot be computed either.

    Args:
        entries: every tensor of the checkpoint.
        config: of its config.json.
        folder: named in an error.

    Raises:
        ConfigError: a tensor is missing, has another shape or an unusable dtype, or is left over
            and would have changed what the model computes.
    """
    expected = expected_tensors(config)
    unread = [name for name in entries if name not in expected and not _COMPUTABLE.search(name)]
    for name in unread:
        _refuse_what_counts(entries[name], name, expected)
    for name, other in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
        if tied_name(name, other, entries, config) != name:
            del expected[name]
    for name, shape in expected.items():
        check_tensor(entries.get(name), name, shape, folder)
    return tuple(sorted(unread))


def check_tensor(
    entry: TensorEntry | None, name: str, shape: tuple[int, ...], folder: Path
) -> TensorEntry:
    """``entry``, which can be read as it is.

    Raises:
        ConfigError: it is missing, of another shape, or not of plain floating point numbers.
    """
    if entry is None:
        raise ConfigError(
            f"{folder}: tensor {name} is missing: the checkpoint is incomplete or "
            f"config.json describes another model"
        )
    if entry.dtype not in ITEM_BYTES:
        raise ConfigError(
            f"{entry.file}: {name} is stored as {entry.dtype}: only unquantised floating "
            f"point weights load"
        )
    if entry.shape != shape:
        raise ConfigError(
            f"{entry.file}: {name} has shape {list(entry.shape)}, config.json asks for "
            f"{list(shape)}"
        )
    return entry


def _refuse_what_counts(
    entry: TensorEntry, name: str, expected: Mapping[str, tuple[int, ...]]
) -> None:
    if _QUANTISED.search(name):
        raise ConfigError(
            f"{entry.file}: {name} belongs to quantised weights, which are not supported: use the "
            f"checkpoint's bf16 or fp32 version"
        )
    if _ADAPTER.search(name):
        raise ConfigError(f"{entry.file}: {name} is of an adapter: merge it into its base model")
    linear = name.removesuffix(".bias")
    if linear != name and f"{linear}.weight" in expected:
        raise ConfigError(
            f"{entry.file}: holds {name}, which config.json says the model does not have: correct "
            f"attention_bias or mlp_bias, or take it out"
        )


def grouped(names: tuple[str, ...], limit: int = 4) -> str:
    """The names for a line of text, those of all layers as one: ``model.layers.*.x (32)``."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    shown = [name if n == 1 else f"{name} ({n})" for name, n in list(counts.items())[:limit]]
    rest = len(counts) - limit
    return ", ".join([*shown, f"{rest} more"] if rest > 0 else shown)
