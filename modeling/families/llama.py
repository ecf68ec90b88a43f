"""Llama, and the many models of its form: biases only where config.json asks for them."""

from modeling.checkpoint.json_fields import Fields
from modeling.families.family import Family, Sizes, Traits, head_dim, kv_heads, no_windows


def _read(fields: Fields, sizes: Sizes) -> Traits:
    has_bias = fields.boolean("attention_bias", False)
    return Traits(
        num_kv_heads=kv_heads(fields, sizes, default=sizes.num_heads),
        head_dim=head_dim(fields, sizes),
        layer_windows=no_windows(sizes),
        attention_bias=has_bias,
        attention_output_bias=has_bias,
        mlp_bias=fields.boolean("mlp_bias", False),
    )


LLAMA = Family(name="llama", read=_read)
