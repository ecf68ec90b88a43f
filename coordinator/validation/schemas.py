"""What a caller may send, field by field. Strict: true is not 1, and "5" is not 5.

What would change the answer if it were honoured, or names our insides, is refused by name, and so
is a field of ours in another spelling (``maxTokens``). Fields that nobody here knows are ignored,
since clients send many, and each is logged once: one may be misspelt. ``null`` is always "not
given".
"""

import logging
from collections.abc import Set
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coordinator.errors import unsupported
from protocol.errors import RequestError

MAX_TOKENS = 2**31 - 1

_log = logging.getLogger(__name__)

# What some other server takes, and names our insides, or would change the answer whatever it says.
_REFUSED = """
    block_ids bootstrap_host bootstrap_port bootstrap_room cache_hashes custom_logit_processor
    custom_params input_embeds input_ids kv_transfer_params logits_processors lora_path lora_request
    mm_processor_kwargs prompt_embeds session_params vllm_xargs
    allowed_token_ids repeat_last_n sampling_seed
    chat_template document_id enable_thinking max_thinking_tokens prompt_mode reasoning
    reasoning_effort think thinking thinking_budget thinking_token_budget
    grammar guided_decoding_backend guided_whitespace_pattern response_schema
    audio prediction prompt_logprobs truncate truncate_prompt_tokens web_search_options
""".split()
# Other names of what we have, which would be missed under ours.
_OTHER_NAMES = """
    extra_body inputs max_length max_new_tokens n_predict num_ctx num_predict options random_seed
    sampling_params stop_sequences stop_strings stopping_strings
""".split()
# The values under which these change nothing: under any other they are refused by name, too.
_PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_REFUSED, ()),
    **dict.fromkeys(_OTHER_NAMES, ((), [], {})),
    # templates are the checkpoint's
    "add_generation_prompt": (True,), "chat_template_kwargs": ({},), "documents": ([],),
    "add_special_tokens": (False,),  # of a chat: its template has them
    "continue_final_message": (False,), "instructions": ("",), "safe_prompt": (False,),
    "system": ("",), "template": ("",),
    # the other endpoint's: each is in the body that has it
    "best_of": (1,), "echo": (False,), "input": ("", []), "messages": ([],), "prompt": ("", []),
    "top_logprobs": (0,),
    # tools and forms
    "format": ("",), "function_call": ("none", "auto"), "functions": ([],),
    "tool_choice": ("none", "auto"), "tools": ([],),
    # sampling that is not offered
    "bad_words": ([],), "detokenize": (True,), "do_sample": (True,), "dry_multiplier": (0,),
    "dynatemp_range": (0,), "early_stopping": (False,), "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,), "eta_cutoff": (0,), "guidance_scale": (1,), "length_penalty": (1,),
    "min_length": (0,), "min_new_tokens": (0,), "mirostat": (0,), "mirostat_mode": (0,),
    "negative_prompt": ("",), "no_repeat_ngram_size": (0,), "nsigma": (0,), "num_beams": (1,),
    "penalty_alpha": (0,), "repeat_penalty": (1,), "smoothing_factor": (0,),
    "temperature_last": (False,), "tfs": (1,), "tfs_z": (1,), "top_a": (0,), "top_n_sigma": (-1, 0),
    "typical": (1,), "typical_p": (1,), "use_beam_search": (False,), "watermark": (False,),
    "xtc_probability": (0,),
    # other forms of the answer
    "decoder_input_details": (False,), "images": ([],), "include_reasoning": (True,),
    "logprob_start_len": (-1,), "modalities": (["text"],), "models": ([],), "n_probs": (0,),
    "no_stop_trim": (False,), "plugins": ([],), "return_hidden_states": (False,),
    "return_tokens_as_token_ids": (False,), "separate_reasoning": (True, False),
    "spaces_between_special_tokens": (True,), "stop_regex": ("", []), "suffix": ("",),
    "top_logprobs_num": (0,), "transforms": ([],), "verbosity": ("medium",),
    # who goes first: there is one class
    "priority": (0,), "service_tier": ("auto", "default"),
}  # fmt: skip
# What clients send, and what changes no answer of ours.
_WITHOUT_EFFECT = frozenset(
    """
    logprobs_mode prompt_cache_key prompt_cache_retention request_id rid safety_identifier store
    stream_reasoning
    """.split()
)
MAX_UNKNOWN_FIELDS = 256

# One wrong id is enough: of a million, each would be an error of its own.
TokenIdList = Annotated[list[int], Field(fail_fast=True)]
_Limited = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(BaseModel):
    """What completions and chat have in common."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: _Limited | None = None
    frequency_penalty: _Limited | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    stop: Any = None
    stop_token_ids: TokenIdList | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    session_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    cache_salt: str | None = None
    # the form of the answer, under the names of three servers: see forms.py
    response_format: Any = None
    structured_outputs: Any = None
    structural_tag: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    user: str | None = None
    metadata: dict[str, Any] | None = None


class CompletionBody(GenerationBody):
    prompt: Any = None
    add_special_tokens: bool | None = None  # in front of a text, as the tokenizer has them
    document_id: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = Field(None, ge=1)


class ChatBody(GenerationBody):
    messages: Any = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None


class TokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: Any = None
    tools: Any = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True)

    model: str | None = None
    tokens: TokenIdList


B = TypeVar("B", bound=BaseModel)


def validate(kind: type[B], body: dict[str, Any]) -> B:
    """``body`` as a ``kind``.

    Raises:
        RequestError: naming the field at fault.
    """
    for name, value in body.items():
        if value is None or name in kind.model_fields:
            continue
        plain = _PLAIN_VALUES.get(name)
        if name.startswith("remote_") or (plain is not None and value not in plain):
            raise unsupported(name[:64], f"{name[:64]} is not supported here")
        known = None if name in _PLAIN_VALUES else _spelt(kind).get(_bare(name))
        if known is not None:
            raise unsupported(name[:64], f"{name[:64]} is no field: {known} is")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _first_error(error) from error


@cache
def _spelt(kind: type[BaseModel]) -> dict[str, str]:
    """The fields that mean something, by what is left of their names without case and marks."""
    return {_bare(name): name for name in (*_PLAIN_VALUES, *kind.model_fields)}


def _bare(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


class UnknownFields:
    """Names of fields that requests have had and that mean nothing here; each is logged once."""

    def __init__(self) -> None:
        self._logged: set[tuple[str, str]] = set()

    def note(self, kind: type[BaseModel], body: dict[str, Any]) -> None:
        """Log what is new among the fields of ``body``; no more than so many names in all."""
        known = kind.model_fields.keys() | _PLAIN_VALUES.keys() | _WITHOUT_EFFECT
        self._log("requests", body.keys() - known)

    def note_message(self, names: Set[str]) -> None:
        """Log what is new among ``names``, fields of messages that mean nothing here."""
        self._log("messages", names)

    def _log(self, whose: str, names: Set[str]) -> None:
        for name in names:
            if (whose, name) not in self._logged and len(self._logged) < MAX_UNKNOWN_FIELDS:
                self._logged.add((whose, name))
                _log.info("%s have the unknown field %r: it is ignored", whose, name[:64])


def _first_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = first["loc"]
    param = str(where[0])[:64] if where else None
    kind = first["type"]
    if kind == "missing":
        return RequestError(f"{param} is missing", code="missing_required_parameter", param=param)
    if kind == "extra_forbidden":
        name = ".".join(map(str, where))[:64]
        return RequestError(f"{name} is no field here", code="unsupported_parameter", param=param)
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return RequestError(f"{param}: {first['msg']}", code=code, param=param)
