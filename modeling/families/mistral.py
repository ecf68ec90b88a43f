"""Mistral: Llama without any bias, and with one window in every layer."""

from modeling.checkpoint.json_fields import Fields
from modeling.families.family import Family, Sizes, Traits, head_dim, kv_heads, one_window


def _read(fields: Fields, sizes: Sizes) -> Traits:
    return Traits(
        num_kv_heads=kv_heads(fields, sizes),
        head_dim=head_dim(fields, sizes),
        layer_windows=one_window(fields, sizes, default=4096),
    )


MISTRAL = Family(name="mistral", read=_read)
