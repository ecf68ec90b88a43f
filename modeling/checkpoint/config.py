"""What a model is, read from a checkpoint folder as data and never as code.

``load_config`` turns the ``config.json`` of a known family (modeling/families) into one
:class:`ModelConfig` that everything else goes by: the transformer's shapes, the KV layout, the
end-of-sequence ids, and the fingerprint by which two processes know that they serve the same model.
What is not understood is refused with one line, not guessed. Torch-free: the coordinator reads it
too.
"""

import hashlib
from pathlib import Path

import msgspec

from modeling.checkpoint.folder import fingerprint, read_checkpoint
from modeling.checkpoint.generation_config import (
    SamplingDefaults,
    parse_sampling,
    read_generation_config,
)
from modeling.checkpoint.json_fields import Fields, read_json
from modeling.checkpoint.rope_config import RopeConfig, parse_rope
from modeling.families import FAMILIES
from modeling.families.family import Sizes
from protocol.errors import ConfigError

__all__ = ["ModelConfig", "RopeConfig", "SamplingDefaults", "is_arithmetic", "load_config"]

ARITHMETIC = "arithmetic"
MAX_LAYERS = 4096
HEADER_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
ONE_DTYPE = ({"F32"}, {"F16"}, {"BF16"})


class ModelConfig(msgspec.Struct, frozen=True):
    """One decoder-only model. All sizes are of the whole model, before any sharding."""

    architecture: str  # "llama", "mistral", "qwen2", "qwen3" or "arithmetic"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    attention_bias: bool = False  # on q, k and v
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, before RoPE
    tie_word_embeddings: bool = False
    layer_windows: tuple[int | None, ...] = ()  # of each layer; None sees everything before it
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"  # of the checkpoint: "float32", "bfloat16" or "float16"
    fingerprint: str = ""
    sampling: SamplingDefaults = SamplingDefaults()  # of requests that name none

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} KV heads: "
                f"the first must be a multiple of the second"
            )
        if self.head_dim % 2 and self.architecture != ARITHMETIC:
            raise ConfigError(f"head_dim {self.head_dim} is odd: rotary embeddings need pairs")
        if not self.layer_windows:
            msgspec.structs.force_setattr(self, "layer_windows", (None,) * self.num_layers)
        if len(self.layer_windows) != self.num_layers:
            raise ConfigError(
                f"{len(self.layer_windows)} layer types for {self.num_layers} layers: "
                f"each layer needs one"
            )


def is_arithmetic(path_or_name: str) -> bool:
    """Whether the name means the arithmetic model, which needs no files."""
    return path_or_name == ARITHMETIC or path_or_name.startswith(f"{ARITHMETIC}:")


def load_config(path_or_name: str, *, max_model_len: int | None = None) -> ModelConfig:
    """The configuration of a checkpoint folder, or of ``arithmetic[:key=value,...]``.

    Args:
        path_or_name: a folder in Hugging Face's form, or the arithmetic model's name.
        max_model_len: serve at most this long; None takes ``max_position_embeddings``. It may
            exceed that only as far as the checkpoint's RoPE scaling goes.

    Raises:
        ConfigError: anything missing, unknown, unsupported or contradictory.
    """
    if is_arithmetic(path_or_name):
        config = _arithmetic_config(path_or_name)
        return config if max_model_len is None else _with_length(config, max_model_len)
    folder = Path(path_or_name)
    if folder.is_file():
        raise ConfigError(f"{path_or_name}: is a file: give the folder of a checkpoint")
    if not folder.is_dir():
        raise ConfigError(
            f"{path_or_name}: no such folder: give a checkpoint folder or {ARITHMETIC!r}"
        )
    where = folder / "config.json"
    fields = Fields(read_json(where), str(where))
    _refuse_unsupported(fields)
    entries = read_checkpoint(folder)
    try:
        config = _parse(fields, folder)
        if max_model_len is not None:
            config = _with_length(config, max_model_len)
    except ConfigError as error:
        prefix = "" if str(folder) in str(error) else f"{where}: "
        raise ConfigError(f"{prefix}{error}") from error
    dtype = _dtype(fields, {entry.dtype for entry in entries.values()})
    return msgspec.structs.replace(
        config, dtype=dtype, fingerprint=fingerprint(entries, _identity(config))
    )


def _identity(config: ModelConfig) -> bytes:
    """What decides the numbers that the model computes; how long one serves does not."""
    blank = msgspec.structs.replace(
        config, max_model_len=0, dtype="", fingerprint="", bos_token_id=None, eos_token_ids=()
    )
    fields = msgspec.to_builtins(blank)
    del fields["sampling"]
    return msgspec.json.encode(fields)


def _with_length(config: ModelConfig, max_model_len: int) -> ModelConfig:
    limit = config.max_model_len
    if config.architecture != ARITHMETIC:
        limit = config.rope.max_len(config.max_model_len)
    if not 1 <= max_model_len <= limit:
        raise ConfigError(
            f"max_model_len {max_model_len} is outside 1 to {limit}, what the model was made for: "
            f"lower it"
        )
    rope = config.rope
    if rope.type == "dynamic" and max_model_len > rope.original_max_len:
        rope = msgspec.structs.replace(rope, target_len=max_model_len)
    return msgspec.structs.replace(config, max_model_len=max_model_len, rope=rope)


def _refuse_unsupported(fields: Fields) -> None:
    for name in ("text_config", "llm_config", "language_config"):
        if isinstance(fields.raw(name), dict):
            fields.fail(name, "makes this a model of more than text, which is not supported: use "
                        "its language model alone")  # fmt: skip
    for name in ("quantization_config", "compression_config"):
        if fields.raw(name):
            fields.fail(name, "is not supported: use the checkpoint's bf16 or fp32 version")
    architectures = fields.strings("architectures")
    if len(architectures) != 1 or architectures[0] not in FAMILIES:
        named = ", ".join(architectures)[:120] or "none"
        supported = f"supported are {', '.join(FAMILIES)}"
        if fields.raw("auto_map"):
            supported += "; code of the checkpoint (auto_map) is never run"
        fields.fail("architectures", f"names {named}; {supported}")
    activation = fields.string("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        fields.fail("hidden_act", f"{activation!r} is not supported: only silu is")


def _parse(fields: Fields, folder: Path) -> ModelConfig:
    family = FAMILIES[fields.strings("architectures")[0]]
    vocab_size = fields.integer("vocab_size", high=2**24)
    sizes = Sizes(
        hidden_size=fields.integer("hidden_size", high=2**20),
        num_layers=fields.integer("num_hidden_layers", high=MAX_LAYERS),
        num_heads=fields.integer("num_attention_heads", high=2**16),
    )
    max_len = fields.integer("max_position_embeddings")
    traits = family.read(fields, sizes)
    bos = [item for item in fields.token_ids("bos_token_id") if 0 <= item < vocab_size]
    generation = read_generation_config(folder)
    return ModelConfig(
        architecture=family.name,
        vocab_size=vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=fields.integer("intermediate_size", high=2**24),
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        num_kv_heads=traits.num_kv_heads,
        head_dim=traits.head_dim,
        max_model_len=max_len,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=parse_rope(fields, max_len),
        attention_bias=traits.attention_bias,
        attention_output_bias=traits.attention_output_bias,
        mlp_bias=traits.mlp_bias,
        qk_norm=traits.qk_norm,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        layer_windows=traits.layer_windows,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=_eos_token_ids(fields, generation, vocab_size),
        sampling=parse_sampling(generation),
    )


def _eos_token_ids(fields: Fields, generation: Fields, vocab_size: int) -> tuple[int, ...]:
    """Those of config.json, then those that generation_config.json adds."""
    ids = (*fields.token_ids("eos_token_id"), *generation.token_ids("eos_token_id"))
    return tuple(dict.fromkeys(item for item in ids if 0 <= item < vocab_size))


def _dtype(fields: Fields, stored: set[str]) -> str:
    for name in stored - set(HEADER_DTYPES) - {"F64"}:
        if name.startswith(("F8", "F4", "F6")):
            fields.fail("dtype", f"of the stored weights is {name}: only unquantised weights load")
    default = HEADER_DTYPES[next(iter(stored))] if stored in ONE_DTYPE else "bfloat16"
    name = fields.string("dtype", fields.string("torch_dtype", default)).removeprefix("torch.")
    if name not in HEADER_DTYPES.values():
        fields.fail("dtype", f"{name!r} is not float32, bfloat16 or float16")
    return name


ARITHMETIC_DEFAULTS = {
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "vocab": 512,
    "max_len": 65536,
}
ARITHMETIC_MIN_VOCAB = 260  # 256 bytes and four special tokens: see tokenizer.py


def _arithmetic_config(name: str) -> ModelConfig:
    """``arithmetic`` or ``arithmetic:layers=4,heads=4,...`` with keys of ARITHMETIC_DEFAULTS."""
    values = dict(ARITHMETIC_DEFAULTS)
    for item in filter(None, name.partition(":")[2].split(",")):
        key, _, value = item.partition("=")
        if key not in values or not value.isdecimal() or not 1 <= int(value) < 2**31:
            raise ConfigError(
                f"{name!r}: {item!r} is not KEY=NUMBER with KEY one of {', '.join(values)}"
            )
        values[key] = int(value)
    if values["vocab"] < ARITHMETIC_MIN_VOCAB or values["layers"] > MAX_LAYERS:
        raise ConfigError(
            f"{name!r}: vocab must be at least {ARITHMETIC_MIN_VOCAB}, layers at most {MAX_LAYERS}"
        )
    config = ModelConfig(
        architecture=ARITHMETIC,
        vocab_size=values["vocab"],
        hidden_size=1,
        intermediate_size=1,
        num_layers=values["layers"],
        num_heads=values["heads"],
        num_kv_heads=values["kv_heads"],
        head_dim=values["head_dim"],
        max_model_len=values["max_len"],
        bos_token_id=256,
        eos_token_ids=(257,),
        dtype="float32",
    )
    digest = hashlib.blake2b(_identity(config), digest_size=16).hexdigest()
    return msgspec.structs.replace(config, fingerprint=digest)
