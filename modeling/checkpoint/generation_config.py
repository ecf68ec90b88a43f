"""generation_config.json: the sampling of the model's makers, for requests that name none.

The fields that vLLM takes are taken, each checked against what a request may say. ``do_sample`` is
not: a request that names no temperature samples at 1, as everywhere in OpenAI's API. Further fields
that would change answers elsewhere are not followed, and are reported by name.

Before transformers had the file, these fields stood in config.json: they count where it is missing.
"""

from pathlib import Path
from typing import Any

import msgspec

from modeling.checkpoint.json_fields import Fields, read_json

FILE_NAME, FILE_BEFORE = "generation_config.json", "config.json"

# A field of transformers' GenerationConfig, or of a request, and the values under which it changes
# nothing.
_NOT_FOLLOWED: dict[str, tuple[Any, ...]] = {
    "do_sample": (None, True),
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "typical_p": (None, 1, 1.0),
    "epsilon_cutoff": (None, 0, 0.0),
    "eta_cutoff": (None, 0, 0.0),
    "top_h": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0),
    "top_n_sigma": (None, 0, 0.0),
    "force_words_ids": (None, []),
    "constraints": (None, []),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None, {}, []),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1, 1.0),
    "stop_strings": (None, []),
    "watermarking_config": (None,),
    "dola_layers": (None,),
}


class SamplingDefaults(msgspec.Struct, frozen=True, omit_defaults=True):
    """The values of fields that a request does not name; None is the default of OpenAI's API."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    not_followed: tuple[str, ...] = ()  # fields of the file that would change answers elsewhere

    def named(self) -> dict[str, float]:
        """The fields that have a value, by their names in a request."""
        fields = msgspec.structs.asdict(self)
        del fields["not_followed"]
        return {name: value for name, value in fields.items() if value is not None}


def read_generation_config(folder: Path) -> Fields:
    """The file's fields, or config.json's where there is no such file.

    Raises:
        ConfigError: it cannot be read.
    """
    path = deciding_file(folder)
    return Fields(read_json(path), str(path))


def deciding_file(folder: Path) -> Path:
    """The file that decides."""
    path = folder / FILE_NAME
    return path if path.is_file() else folder / FILE_BEFORE


def parse_sampling(fields: Fields) -> SamplingDefaults:
    """The defaults that generation_config.json gives.

    Raises:
        ConfigError: a value that no request could give, naming file and field.
    """

    def ranged(name: str, low: float, high: float, *, without_low: bool = False) -> float | None:
        if not fields.has(name):
            return None
        value = fields.number(name, above=-1e30)
        if not low <= value <= high or (without_low and value == low):
            least = "above" if without_low else "at least"
            fields.fail(name, f"must be {least} {low:g} and at most {high:g}, found {value:g}")
        return value

    return SamplingDefaults(
        temperature=ranged("temperature", 0, 2),
        top_k=fields.integer("top_k", low=-1) if fields.has("top_k") else None,
        top_p=ranged("top_p", 0, 1, without_low=True),
        min_p=ranged("min_p", 0, 1),
        repetition_penalty=ranged("repetition_penalty", 0, 100, without_low=True),
        max_tokens=fields.integer("max_new_tokens") if fields.has("max_new_tokens") else None,
        not_followed=tuple(
            name for name, plain in _NOT_FOLLOWED.items() if fields.raw(name) not in plain
        ),
    )
