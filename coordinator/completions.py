"""``/v1/completions``: text or token ids in, one or several independent prompts."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from coordinator.answer import Answer
from coordinator.document_parts import completion_encoder
from coordinator.frontend import Asker, Frontend
from coordinator.parameters import read_options
from coordinator.schemas import CompletionBody, validate
from coordinator.shapes import CompletionShape
from coordinator.tokenizing import TextTools
from protocol.errors import RequestError

DEFAULT_MAX_TOKENS = 16  # OpenAI's

Encoder = Callable[[TextTools], Sequence[int]]


async def complete(frontend: Frontend, asker: Asker, fields: dict[str, Any]) -> Answer:
    """The answer to a completion request.

    Raises:
        RequestError: the request cannot be served as it is.
    """
    body = validate(CompletionBody, fields)
    frontend.unknown_fields.note(CompletionBody, fields)
    frontend.check_model(body.model)
    options = read_options(
        body,
        max_tokens=body.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        num_logprobs=body.logprobs,
        model=frontend.model,
        limits=frontend.config.limits,
    )
    if (body.best_of or options.num_choices) != options.num_choices:
        raise RequestError(
            "best_of other than n is not supported", code="unsupported_parameter", param="best_of"
        )
    if body.echo and body.logprobs is not None:
        raise RequestError(
            "echo with logprobs is not supported: prompts have no log-probabilities here",
            code="unsupported_parameter",
            param="echo",
        )
    if body.document_id is None:
        encoders = [_encoder(frontend, prompt) for prompt in _prompts(frontend, body.prompt)]
        choices = await frontend.prepare(asker, options, encoders, "prompt")
    else:
        behind, attached = await completion_encoder(frontend, asker, body.document_id)
        prompts = _prompts(frontend, "" if body.prompt is None else body.prompt)
        encoders = [behind(prompt) for prompt in prompts]
        choices = await frontend.prepare(asker, options, encoders, "prompt", attached)
    if body.echo:
        texts = await frontend.tokenization.run(
            lambda tools: [
                tools.tokenizer.decode(choice.generation.prompt_token_ids) for choice in choices
            ]
        )
        choices = [replace(c, echoed=text) for c, text in zip(choices, texts, strict=True)]
    shape = CompletionShape(
        return_token_ids=options.return_token_ids,
        with_logprobs=body.logprobs is not None,
        bytes_of=frontend.tokenization.tools.tokenizer.token_bytes,
    )
    return Answer(frontend, asker, options, choices, shape)


def _prompts(frontend: Frontend, prompt: Any) -> list[str | list[Any]]:  # noqa: ANN401 - a caller's JSON value
    """The prompts in the four forms that OpenAI has: text, texts, token ids, lists of them."""
    if prompt is None:
        raise RequestError("prompt is missing", code="missing_required_parameter", param="prompt")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise _wrong_type()
    if not prompt:
        raise RequestError("the prompt is empty", code="empty_prompt", param="prompt")
    if type(prompt[0]) not in (str, list):
        return [prompt]
    if set(map(type, prompt)) != {type(prompt[0])}:
        raise _wrong_type()
    if len(prompt) > frontend.config.limits.max_prompts:
        raise RequestError(
            f"{len(prompt)} prompts, at most {frontend.config.limits.max_prompts} are served",
            code="invalid_value",
            param="prompt",
        )
    return prompt


def _wrong_type() -> RequestError:
    return RequestError(
        "prompt must be a string, a list of strings, a list of token ids, or a list of such lists",
        code="invalid_type",
        param="prompt",
    )


def _encoder(frontend: Frontend, prompt: str | list[Any]) -> Encoder:
    if isinstance(prompt, list):
        return lambda _tools: prompt
    frontend.check_text(prompt, "prompt")
    return lambda tools: tools.tokenizer.encode(prompt) if prompt else []
