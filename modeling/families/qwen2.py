"""Qwen2 and Qwen2.5: biases on q, k and v, whatever config.json says; a window in some layers."""

from modeling.checkpoint.json_fields import Fields
from modeling.families.family import Family, Sizes, Traits, head_dim, kv_heads, window_by_layer


def _read(fields: Fields, sizes: Sizes) -> Traits:
    return Traits(
        num_kv_heads=kv_heads(fields, sizes),
        head_dim=head_dim(fields, sizes),
        layer_windows=window_by_layer(fields, sizes),
        attention_bias=True,
    )


QWEN2 = Family(name="qwen2", read=_read)
