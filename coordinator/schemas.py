"""What a caller may send, field by field. Strict: true is not 1, and "5" is not 5.

Unknown fields are ignored, since clients send many; those that would change the answer if they were
honoured, or that name our insides, are refused by name. ``null`` is always "not given".
"""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protocol.errors import RequestError

MAX_TOKENS = 2**31 - 1

_DENIED = frozenset(
    {
        # our insides, and other servers'
        "kv_transfer_params",
        "block_ids",
        "cache_hashes",
        "prompt_embeds",
        "mm_processor_kwargs",
        "lora_request",
        # templates are the checkpoint's
        "chat_template",
        "chat_template_kwargs",
        "continue_final_message",
        # would change the answer
        "document_id",
        "documents",
        "functions",
        "function_call",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "structured_outputs",
        "grammar",
        "prompt_logprobs",
        "allowed_token_ids",
        "bad_words",
        "logits_processors",
        "truncate_prompt_tokens",
        "suffix",
        "audio",
        "prediction",
        "web_search_options",
        "use_beam_search",
    }
)
_PLAIN_VALUES: dict[str, tuple[Any, ...]] = {  # the only values under which these change nothing
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "add_generation_prompt": (True,),
}

_Limited = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(BaseModel):
    """What completions and chat have in common."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
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
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    session_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    cache_salt: str | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None


class CompletionBody(GenerationBody):
    prompt: Any = None
    document_id: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = Field(None, ge=1)


class ChatBody(GenerationBody):
    messages: Any = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class TokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: Any = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True)

    model: str | None = None
    tokens: list[int]


B = TypeVar("B", bound=BaseModel)


def validate(kind: type[B], body: dict[str, Any]) -> B:
    """``body`` as a ``kind``.

    Raises:
        RequestError: naming the field at fault.
    """
    for name, value in body.items():
        is_denied = name in _DENIED and name not in kind.model_fields
        has_effect = name in _PLAIN_VALUES and value not in _PLAIN_VALUES[name]
        if value is not None and (is_denied or has_effect or name.startswith("remote_")):
            raise RequestError(
                f"{name[:64]} is not supported by this server",
                code="unsupported_parameter",
                param=name[:64],
            )
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _first_error(error) from error


def _first_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = first["loc"]
    param = str(where[0])[:64] if where else None
    kind = first["type"]
    if kind == "missing":
        return RequestError(f"{param} is missing", code="missing_required_parameter", param=param)
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return RequestError(f"{param}: {first['msg']}", code=code, param=param)
