"""Qwen3: norms on the heads of q and k, and heads of 128 unless config.json says otherwise."""

from modeling.checkpoint.json_fields import Fields
from modeling.families.family import Family, Sizes, Traits, head_dim, kv_heads, window_by_layer


def _read(fields: Fields, sizes: Sizes) -> Traits:
    has_bias = fields.boolean("attention_bias", False)
    return Traits(
        num_kv_heads=kv_heads(fields, sizes),
        head_dim=head_dim(fields, sizes, default=128),
        layer_windows=window_by_layer(fields, sizes),
        attention_bias=has_bias,
        attention_output_bias=has_bias,
        qk_norm=True,
    )


QWEN3 = Family(name="qwen3", read=_read)
