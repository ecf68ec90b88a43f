"""A body of ``/v1/completions`` to a request: text or token ids in, in a text worker.

OpenAI's four forms of a prompt: text, texts, token ids, lists of them; behind a document, if the
request names one.
"""

from typing import Any

import msgspec

from coordinator.auth import Tenant
from coordinator.errors import invalid_value, unsupported
from coordinator.jobs.questions.prompts import completion_beginning, completion_tokens
from coordinator.text.tasks import NeedsDocument, Prepared, Stage
from coordinator.validation.forms import read_form
from coordinator.validation.reading import Encoder, Named, Reading
from coordinator.validation.schemas import CompletionBody
from protocol.token_ids import TokenIds

PROMPT = "prompt"
DEFAULT_MAX_TOKENS = 16  # OpenAI's


def read_completion(
    reading: Reading, tenant: Tenant, fields: dict[str, Any], document: Named | None
) -> Prepared | NeedsDocument:
    """The request that ``fields`` ask for; what it names first, if that has not been opened.

    Raises:
        RequestError: the request cannot be served as it is.
    """
    body = reading.begin(CompletionBody, fields)
    options = reading.options(body, body.logprobs, DEFAULT_MAX_TOKENS)
    asked = read_form(body)
    if asked is not None:
        options = reading.with_grammar(options, *asked)
    _check(body, options.num_choices)
    if body.document_id is not None and document is None:
        return NeedsDocument(body.document_id)
    given = "" if document is not None and body.prompt is None else body.prompt
    prompts = _prompts(reading, given)
    with_special = body.add_special_tokens is not False
    encoders = [_encoder(reading, prompt, with_special=with_special) for prompt in prompts]
    attached = None
    if document is not None:
        beginning = completion_beginning(reading.tools, *document)
        attached, begun = beginning.attached, beginning.token_ids
        encoders = [
            lambda prompt=prompt: completion_tokens(reading.tools, begun, prompt)  # type: ignore[misc]
            for prompt in prompts
        ]
    reading.enter(Stage.ENCODING, sum(map(len, prompts)))
    prepared = reading.prepare(options, tenant, encoders, PROMPT, attached)
    if not body.echo:
        return prepared
    # Only text that came as text is known as it was.
    skips = options.skip_special_tokens
    echoed = [
        prompt
        if isinstance(prompt, str) and document is None
        else reading.tools.tokenizer.decode(TokenIds(packed.token_ids), skip_special_tokens=skips)
        for prompt, packed in zip(prompts, prepared.prompts, strict=True)
    ]
    return msgspec.structs.replace(prepared, echoed=echoed)


def _check(body: CompletionBody, num_choices: int) -> None:
    if (body.best_of or num_choices) != num_choices:
        raise unsupported("best_of", "best_of other than n is not supported")
    if body.echo and body.logprobs is not None:
        message = "echo with logprobs is not supported: prompts have no log-probabilities here"
        raise unsupported("echo", message)
    if body.document_id is not None and body.add_special_tokens is False:
        message = (
            "a document begins with the tokenizer's special tokens: add_special_tokens cannot be "
            "false with document_id"
        )
        raise unsupported("add_special_tokens", message)


def _prompts(reading: Reading, prompt: Any) -> list[str | list[Any]]:  # noqa: ANN401 - a caller's JSON value
    """The prompts in the four forms that OpenAI has: text, texts, token ids, lists of them."""
    if prompt is None:
        raise invalid_value(PROMPT, "prompt is missing", "missing_required_parameter")
    if isinstance(prompt, str):
        return [prompt]
    if prompt == []:
        raise invalid_value(PROMPT, "the prompt is empty", "empty_prompt")
    if isinstance(prompt, list) and type(prompt[0]) not in (str, list):
        return [prompt]
    if not isinstance(prompt, list) or set(map(type, prompt)) != {type(prompt[0])}:
        message = "prompt must be a string, a list of strings, a list of token ids, or a list of "
        raise invalid_value(PROMPT, f"{message}such lists", "invalid_type")
    most = reading.limits.max_prompts
    if len(prompt) > most:
        raise invalid_value(PROMPT, f"{len(prompt)} prompts, at most {most} are served")
    return prompt


def _encoder(reading: Reading, prompt: str | list[Any], *, with_special: bool) -> Encoder:
    if isinstance(prompt, list):
        return lambda: prompt
    reading.check_text(prompt, PROMPT)
    if not prompt:
        return list
    encode = reading.tools.tokenizer.encode
    return lambda: encode(prompt, add_special_tokens=with_special)
