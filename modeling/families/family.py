"""What a family of models is, as data: what differs between models that one transformer computes.

A family is one file with one :class:`Family`: what a config.json means beyond the fields that all
families share (``read``), and what the tensors are called (``names``). It can only say what
modeling/transformer.py can do; a new kind of thing is a new field of :class:`Traits`, and a few
lines there.

Torch-free: the coordinator reads configurations, too.
"""

from collections.abc import Callable
from dataclasses import dataclass

from modeling.checkpoint.json_fields import Fields

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class Sizes:
    """What every config.json says in the same words."""

    hidden_size: int
    num_layers: int
    num_heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a family decides of one model. The names are those of ModelConfig."""

    num_kv_heads: int
    head_dim: int
    layer_windows: tuple[int | None, ...]  # of each layer; None sees everything before it
    attention_bias: bool = False  # on q, k and v
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, before RoPE


@dataclass(frozen=True, slots=True)
class TensorNames:
    """What the tensors are called in transformers; the defaults are Llama's.

    Linear layers and norms are named without ``.weight`` and ``.bias``, and those of a layer
    without the layer's own name. The embedding and the head have the same names in every family
    (checkpoint/folder.py).
    """

    final_norm: str = "model.norm"
    layer: str = "model.layers.{}"  # its number goes in
    attention_norm: str = "input_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    output: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"


@dataclass(frozen=True, slots=True)
class Family:
    """One family.

    Args:
        name: ``ModelConfig.architecture``.
        read: what a config.json means; raises ConfigError by the fields that it is given.
        names: of the tensors.
    """

    name: str
    read: Callable[[Fields, Sizes], Traits]
    names: TensorNames = TensorNames()


# -- what families read alike ----------------------------------------------------------------------


def kv_heads(fields: Fields, sizes: Sizes, *, default: int | None = None) -> int:
    """``num_key_value_heads``.

    Args:
        fields: of config.json.
        sizes: of the model.
        default: where the field is missing; None: it must be there, because the families of
            transformers default to numbers of their own.

    Raises:
        ConfigError: it is missing, or does not divide the heads.
    """
    if default is None and "num_key_value_heads" not in fields.names():
        return fields.integer("num_key_value_heads")  # which says that it is missing
    num_kv_heads = fields.integer("num_key_value_heads", default or sizes.num_heads)
    if sizes.num_heads % num_kv_heads:
        fields.fail(
            "num_key_value_heads", f"{num_kv_heads} does not divide {sizes.num_heads} heads"
        )
    return num_kv_heads


def head_dim(fields: Fields, sizes: Sizes, *, default: int | None = None) -> int:
    """``head_dim``.

    Args:
        fields: of config.json.
        sizes: of the model.
        default: where the field is missing; None: the hidden size is shared out over the heads.

    Raises:
        ConfigError: the hidden size is no multiple of the heads.
    """
    if fields.has("head_dim"):
        return fields.integer("head_dim", high=4096)
    if default is not None:
        return default
    if sizes.hidden_size % sizes.num_heads:
        fields.fail(
            "hidden_size",
            f"{sizes.hidden_size} is no multiple of {sizes.num_heads} heads, and head_dim is "
            f"missing",
        )
    return sizes.hidden_size // sizes.num_heads


def no_windows(sizes: Sizes) -> tuple[None, ...]:
    """Every layer sees everything before it."""
    return (None,) * sizes.num_layers


def one_window(fields: Fields, sizes: Sizes, *, default: int) -> tuple[int | None, ...]:
    """``sliding_window`` in every layer; null is none, and a missing field is ``default``."""
    absent = "sliding_window" not in fields.names()
    if not absent and fields.raw("sliding_window") is None:
        return no_windows(sizes)
    return (fields.integer("sliding_window", default),) * sizes.num_layers


def window_by_layer(fields: Fields, sizes: Sizes) -> tuple[int | None, ...]:
    """``sliding_window`` in some layers, if ``use_sliding_window`` is on.

    ``layer_types`` names them; where it is missing, they are those from ``max_window_layers`` on.

    Raises:
        ConfigError: the fields contradict each other.
    """
    types = fields.strings("layer_types")
    is_on = fields.boolean("use_sliding_window", False)
    if not is_on or fields.raw("sliding_window", 0) is None:
        if SLIDING in types:
            fields.fail("layer_types", "has sliding layers, but use_sliding_window is off")
        return no_windows(sizes)
    window = fields.integer("sliding_window", 4096)
    if not types:
        first = fields.integer("max_window_layers", 28, low=0)
        return tuple(window if layer >= first else None for layer in range(sizes.num_layers))
    if len(types) != sizes.num_layers or set(types) - {FULL, SLIDING}:
        fields.fail(
            "layer_types", f"must be {FULL} or {SLIDING} for each of {sizes.num_layers} layers"
        )
    return tuple(window if kind == SLIDING else None for kind in types)
