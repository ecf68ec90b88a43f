"""From a validated body to our own types: what no single field's range can say is checked here."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from coordinator.config import CoordinatorConfig, Limits
from coordinator.errors import invalid_value
from coordinator.text.tokens import TextOptions
from coordinator.validation.schemas import GenerationBody
from modeling.checkpoint.config import ModelConfig
from protocol.errors import RequestError
from protocol.request import SamplingParams

_SEED_MASK = 2**63 - 1
_ANY_SEED = -1  # as vLLM and llama.cpp have it


@dataclass(frozen=True, slots=True)
class Options:
    """What a request asks for beside its prompt.

    ``max_tokens`` None takes the default, but no more than fits; no default is all that fits.
    """

    sampling: SamplingParams  # its max_tokens is filled in by ``for_prompt``
    max_tokens: int | None
    default_max_tokens: int | None
    text: TextOptions
    num_choices: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    skip_special_tokens: bool
    return_token_ids: bool
    session_id: str | None
    cache_salt: str | None


def read_options(
    body: GenerationBody,
    *,
    default_max_tokens: int | None = None,
    num_logprobs: int | None,
    model: ModelConfig,
    limits: Limits,
) -> Options:
    """Check the fields against each other and the model.

    Args:
        default_max_tokens: of the endpoint; None takes the model's.
        num_logprobs: alternatives of each token that are shown; None shows no log-probabilities.

    Raises:
        RequestError: naming the field at fault.
    """
    newer = body.max_completion_tokens  # of the two names it counts
    max_tokens = body.max_tokens if newer is None else newer
    num_choices = body.n or 1
    if num_choices > limits.max_choices:
        raise invalid_value("n", f"n is {num_choices}, at most {limits.max_choices} are served")
    if body.stream_options is not None and not body.stream:
        raise invalid_value("stream_options", "stream_options needs stream: true")
    min_tokens = body.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise invalid_value(
            "min_tokens", f"min_tokens {min_tokens} exceeds max_tokens {max_tokens}"
        )
    _check_labels(body, limits)
    stream_options = body.stream_options
    return Options(
        sampling=_sampling(body, num_logprobs, model, limits),
        max_tokens=max_tokens,
        default_max_tokens=default_max_tokens or model.sampling.max_tokens,
        text=TextOptions(
            stops=_stops(body.stop, limits),
            include_stop=bool(body.include_stop_str_in_output),
            min_tokens=min_tokens,
            caller_stop_token_ids=frozenset(body.stop_token_ids or ()),
            is_empty=max_tokens == 0,
        ),
        num_choices=num_choices,
        stream=bool(body.stream),
        include_usage=bool(stream_options and stream_options.include_usage),
        continuous_usage=bool(stream_options and stream_options.continuous_usage_stats),
        skip_special_tokens=body.skip_special_tokens is not False,
        return_token_ids=bool(body.return_token_ids),
        session_id=body.session_id,
        cache_salt=body.cache_salt,
    )


def _sampling(
    body: GenerationBody, num_logprobs: int | None, model: ModelConfig, limits: Limits
) -> SamplingParams:
    caller_stops = check_token_ids("stop_token_ids", body.stop_token_ids or [], model.vocab_size)
    default = model.sampling
    ignore_eos = bool(body.ignore_eos)
    eos_token_ids = () if ignore_eos else model.eos_token_ids
    return SamplingParams(
        max_tokens=1,  # until the prompt's length is known
        seed=secrets.randbits(63) if body.seed in (None, _ANY_SEED) else body.seed & _SEED_MASK,
        temperature=_first(body.temperature, default.temperature, 1.0),
        top_k=max(0, int(_first(body.top_k, default.top_k, 0))),
        top_p=_first(body.top_p, default.top_p, 1.0),
        min_p=_first(body.min_p, default.min_p, 0.0),
        presence_penalty=_first(body.presence_penalty, 0.0),
        frequency_penalty=_first(body.frequency_penalty, 0.0),
        repetition_penalty=_first(body.repetition_penalty, default.repetition_penalty, 1.0),
        logit_bias=_logit_bias(body.logit_bias or {}, model.vocab_size, limits),
        min_tokens=body.min_tokens or 0,
        stop_token_ids=tuple(dict.fromkeys((*eos_token_ids, *caller_stops))),
        ignore_eos=ignore_eos,
        num_logprobs=num_logprobs,
    )


def for_prompt(options: Options, num_prompt_tokens: int, max_model_len: int) -> SamplingParams:
    """The sampling parameters for a prompt of this length.

    Raises:
        RequestError: the prompt, or prompt and answer together, exceed the context.
    """
    if num_prompt_tokens >= max_model_len:
        raise context_exceeded(num_prompt_tokens, max_model_len, "prompt")
    room = max_model_len - num_prompt_tokens
    max_tokens = options.max_tokens
    if max_tokens is None:
        default = options.default_max_tokens
        max_tokens = room if default is None else max(default, options.sampling.min_tokens)
        max_tokens = min(room, max_tokens)
    if max_tokens > room:
        raise RequestError(
            f"this model's context is {max_model_len} tokens: the prompt has {num_prompt_tokens} "
            f"and {max_tokens} were asked for, {num_prompt_tokens + max_tokens} together. "
            f"Shorten the prompt or lower max_tokens to {room}.",
            code="context_length_exceeded",
            param="max_tokens",
        )
    if options.sampling.min_tokens > max_tokens:
        raise invalid_value(
            "min_tokens",
            f"min_tokens {options.sampling.min_tokens} exceeds the {max_tokens} tokens that fit",
        )
    # Nothing asked for still has the prompt computed and cached: its one token is shown to nobody.
    return msgspec.structs.replace(options.sampling, max_tokens=max(1, max_tokens))


def context_exceeded(num_prompt_tokens: int, max_model_len: int, param: str) -> RequestError:
    """The prompt alone is too long."""
    return RequestError(
        f"this model's context is {max_model_len} tokens and the prompt has {num_prompt_tokens}: "
        f"at most {max_model_len - 1} leave room for an answer",
        code="context_length_exceeded",
        param=param,
    )


def mixed_seed(seed: int, choice: int) -> int:
    """A seed for each choice: 0 keeps the caller's. SplitMix64's finaliser (Steele et al. 2014)."""
    if choice == 0:
        return seed
    z = (seed + choice * 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) & _SEED_MASK


def check_model(config: CoordinatorConfig, name: str | None) -> None:
    """Raises RequestError when ``name`` is given and is no name of the model that is served."""
    if name is not None and name not in config.model_names:
        names = ", ".join(config.model_names)
        raise RequestError(
            f"the model {name[:64]!r} does not exist here: served is {names[:256]}",
            code="model_not_found",
            param="model",
            status=404,
        )


def check_token_ids(param: str, token_ids: Sequence[Any], vocab_size: int) -> tuple[int, ...]:
    """``token_ids`` as a prompt.

    Raises:
        RequestError: something in it is no token of the model.
    """
    # Not isinstance: true is an int there. Whole-list checks, since prompts may be a million long.
    if set(map(type, token_ids)) - {int}:
        raise invalid_value(param, f"{param}: token ids must be integers", "invalid_type")
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        raise invalid_value(param, f"{param}: token ids must be from 0 to {vocab_size - 1}")
    return tuple(token_ids)


def _first(*values: float | None) -> float:
    """The first that is given: null is "not given", 0 is a value."""
    return float(next(value for value in values if value is not None))


def _stops(stop: Any, limits: Limits) -> tuple[str, ...]:  # noqa: ANN401 - a caller's JSON value
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(item, str) for item in stops):
        raise invalid_value("stop", "stop must be a string or a list of strings", "invalid_type")
    if len(stops) > limits.max_stops:
        raise invalid_value(
            "stop", f"{len(stops)} stop strings, at most {limits.max_stops} are served"
        )
    if not all(1 <= len(item) <= limits.max_stop_chars for item in stops):
        raise invalid_value("stop", f"a stop string has 1 to {limits.max_stop_chars} characters")
    return tuple(stops)


def _logit_bias(given: dict[str, float], vocab_size: int, limits: Limits) -> dict[int, float]:
    if len(given) > limits.max_logit_bias:
        raise invalid_value(
            "logit_bias", f"logit_bias has more than {limits.max_logit_bias} entries"
        )
    bias: dict[int, float] = {}
    for key, value in given.items():
        is_number = key.isascii() and key.isdigit() and len(key) <= 10
        # "07" beside "7" would be one token with two biases.
        if not is_number or str(int(key)) != key or int(key) >= vocab_size:
            raise invalid_value(
                "logit_bias", f"logit_bias: {key[:32]!r} is not a token id below {vocab_size}"
            )
        bias[int(key)] = value
    return bias


def _check_labels(body: GenerationBody, limits: Limits) -> None:
    if body.user is not None and len(body.user) > limits.max_label_chars:
        raise invalid_value("user", f"user is longer than {limits.max_label_chars} characters")
    for key, value in (body.metadata or {}).items():
        if len(key) + len(str(value)) > limits.max_label_chars or len(body.metadata or {}) > 64:
            raise invalid_value("metadata", "metadata is too large")
