"""A body of ``/v1/completions`` to a request: text or token ids in, in a text worker.

OpenAI's four forms of a prompt: text, texts, token ids, lists of them; behind a document, if the
request names one.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from coordinator.auth import Tenant
from coordinator.jobs.questions.prompts import completion_beginning, completion_tokens
from coordinator.text.tasks import NeedsDocument, Prepared, Stage
from coordinator.validation.forms import read_form
from coordinator.validation.parameters import Options
from coordinator.validation.reading import Encoder, Named, Reading
from coordinator.validation.schemas import CompletionBody
from protocol.errors import RequestError
from protocol.token_ids import TokenIds

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def read_completion(
    reading: Reading,
    tenant: Tenant,
    fields: dict[str, Any],
    document: Named | None,
) -> Prepared | NeedsDocument:
    """The request that ``fields`` ask for; what it names first, if that has not been opened.

    Raises:
        RequestError: the request cannot be served as it is.
    """
    body = reading.begin(CompletionBody, fields)
    options = reading.options(
        body,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        num_logprobs=body.logprobs,
    )
    asked = read_form(body)
    if asked is not None:
        options = reading.with_grammar(options, *asked)
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
    if body.document_id is not None and body.add_special_tokens is False:
        raise RequestError(
            "a document begins with the tokenizer's special tokens: add_special_tokens cannot be "
            "false with document_id",
            code="unsupported_parameter",
            param="add_special_tokens",
        )
    if body.document_id is not None and document is None:
        return NeedsDocument(body.document_id)
    given = "" if document is not None and body.prompt is None else body.prompt
    prompts = _prompts(reading, given)
    with_special = body.add_special_tokens is not False
    encoders = [_encoder(reading, prompt, with_special=with_special) for prompt in prompts]
    attached = None
    if document is not None:
        beginning = completion_beginning(reading.tools, *document)
        attached = beginning.attached
        encoders = [_behind(beginning.token_ids, prompt) for prompt in prompts]
    reading.enter(Stage.ENCODING, sum(map(len, prompts)))
    prepared = reading.prepare(options, tenant, encoders, "prompt", attached)
    echoed: list[str] = []
    if body.echo:
        for prompt, packed in zip(prompts, prepared.prompts, strict=True):
            if isinstance(prompt, str) and document is None:
                echoed.append(prompt)
            else:
                echoed.append(_text(reading, options, packed.token_ids))
    with_logprobs = body.logprobs is not None
    return msgspec.structs.replace(prepared, with_logprobs=with_logprobs, echoed=echoed)


def _text(reading: Reading, options: Options, packed: memoryview) -> str:
    """What tokens say, for an echo: only text that came as text is known as it was."""
    skips = options.skip_special_tokens
    return reading.tools.tokenizer.decode(TokenIds(packed), skip_special_tokens=skips)


def _behind(beginning: Sequence[int], prompt: str | list[Any]) -> Encoder:
    return lambda tools: completion_tokens(tools, beginning, prompt)


def _prompts(reading: Reading, prompt: Any) -> list[str | list[Any]]:  # noqa: ANN401 - a caller's JSON value
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
    if len(prompt) > reading.limits.max_prompts:
        raise RequestError(
            f"{len(prompt)} prompts, at most {reading.limits.max_prompts} are served",
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


def _encoder(reading: Reading, prompt: str | list[Any], *, with_special: bool) -> Encoder:
    if isinstance(prompt, list):
        return lambda _tools: prompt
    reading.check_text(prompt, "prompt")
    if not prompt:
        return lambda _tools: []
    return lambda tools: tools.tokenizer.encode(prompt, add_special_tokens=with_special)
