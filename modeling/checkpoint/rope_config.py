"""Which rotary embedding a checkpoint asks for, in one spelling.

Checkpoints say it as ``rope_theta`` + ``rope_scaling`` (transformers 4) or as ``rope_parameters``
(transformers 5). Both become a :class:`RopeConfig`; the frequencies are computed in rope.py.
"""

import msgspec

from modeling.checkpoint.json_fields import Fields

DEFAULT_THETA = 10_000.0
ROPE_TYPES = ("none", "linear", "dynamic", "llama3", "yarn")
MAX_FACTOR = 4096.0


class RopeConfig(msgspec.Struct, frozen=True, omit_defaults=True):
    """Rotary position embedding; fields that a type does not use keep their defaults.

    ``dynamic`` (NTK) is fixed when the model is loaded: up to ``original_max_len`` it is the plain
    embedding, as in transformers; a longer ``target_len`` gives the static NTK base of that
    length for every position. transformers recomputes the base as a sequence grows and leaves the
    cached keys at the old one, which no cache that is shared, chunked or moved can follow.
    """

    theta: float = DEFAULT_THETA
    type: str = "none"
    factor: float = 1.0
    original_max_len: int = 0  # llama3, yarn, dynamic: the length before scaling
    target_len: int = 0  # dynamic: the length that the base is made for
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn; None: from factor and the mscales
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn

    def max_len(self, max_position_embeddings: int) -> int:
        """The longest sequence that the scaling was made for."""
        if self.type in ("linear", "dynamic", "yarn"):
            original = self.original_max_len or max_position_embeddings
            return max(max_position_embeddings, int(original * self.factor))
        return max_position_embeddings


def parse_rope(fields: Fields, max_position_embeddings: int) -> RopeConfig:
    """The rotary embedding of a config.json, in either spelling.

    Raises:
        ConfigError: a scaling type that is not one of :data:`ROPE_TYPES`, or a wrong parameter.
    """
    section = "rope_parameters" if fields.has("rope_parameters") else "rope_scaling"
    rope = fields.section(section) or Fields({}, "")
    if section == "rope_parameters":
        _refuse_another(fields, rope)
    if any(isinstance(rope.raw(name), dict) for name in rope.names()):
        fields.fail(section, "differs between layer types, which is not supported")
    for holder in (fields, rope):
        if holder.has("partial_rotary_factor") and holder.number("partial_rotary_factor") != 1.0:
            holder.fail("partial_rotary_factor", "other than 1 is not supported")
    theta = (rope if rope.has("rope_theta") else fields).number(
        "rope_theta", DEFAULT_THETA, above=1.0
    )
    kind = rope.string("rope_type", rope.string("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind not in ROPE_TYPES:
        rope.fail(
            "rope_type", f"{kind!r} is not supported: use default, {', '.join(ROPE_TYPES[1:])}"
        )
    if kind in ("linear", "dynamic"):
        return RopeConfig(
            theta=theta,
            type=kind,
            factor=_factor(rope),
            original_max_len=max_position_embeddings if kind == "dynamic" else 0,
            target_len=max_position_embeddings if kind == "dynamic" else 0,
        )
    owner = fields if fields.has("original_max_position_embeddings") else rope
    original = owner.integer("original_max_position_embeddings", max_position_embeddings)
    if kind == "llama3":
        return _llama3(rope, theta, original)
    return _yarn(rope, theta, original, max_position_embeddings)


def _refuse_another(fields: Fields, rope: Fields) -> None:
    """Refuse the older spelling in a newer file, where it would have no effect.

    Guides for long contexts tell readers to add it.
    """
    older = fields.section("rope_scaling") or Fields({}, "")
    named = [("rope_scaling", name, older.raw(name)) for name in older.names()]
    if rope.has("rope_theta"):
        named.append(("rope_theta", "rope_theta", fields.raw("rope_theta")))
    for field, name, value in named:
        same = ("rope_type", "type") if name in ("rope_type", "type") else (name,)
        if value is not None and value not in [rope.raw(other) for other in same]:
            fields.fail(
                field,
                f"and rope_parameters are both there, and differ in {name}: put what counts into "
                f"rope_parameters, and take {field} out",
            )


def _factor(rope: Fields) -> float:
    factor = rope.number("factor")
    if not 1.0 <= factor <= MAX_FACTOR:
        rope.fail("factor", f"must lie in 1 to {MAX_FACTOR:g}, found {factor}")
    return factor


def _llama3(rope: Fields, theta: float, original: int) -> RopeConfig:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        rope.fail("high_freq_factor", f"must be above low_freq_factor ({low}), found {high}")
    return RopeConfig(
        theta=theta,
        type="llama3",
        factor=_factor(rope),
        original_max_len=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(rope: Fields, theta: float, original: int, max_position_embeddings: int) -> RopeConfig:
    factor = _factor(rope) if rope.has("factor") else max_position_embeddings / original

    def optional(name: str) -> float | None:
        return rope.number(name, above=-1e30) if rope.has(name) else None

    return RopeConfig(
        theta=theta,
        type="yarn",
        factor=factor,
        original_max_len=original,
        attention_factor=optional("attention_factor"),
        # transformers takes 0 for "not given" in all four
        beta_fast=optional("beta_fast") or 32.0,
        beta_slow=optional("beta_slow") or 1.0,
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        truncate=rope.boolean("truncate", True),
    )
