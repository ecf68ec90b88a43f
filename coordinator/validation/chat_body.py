"""A body of ``/v1/chat/completions`` to a request: messages through the model's own chat template.

The template is code that came with the checkpoint: it runs here, in a text worker, only.
"""

from typing import Any

import msgspec

from coordinator.auth import Tenant
from coordinator.config import Limits
from coordinator.jobs.questions.prompts import chat_prompt, check_system
from coordinator.text.tasks import NeedsDocument, Prepared, Stage
from coordinator.validation.reading import Encoder, Named, Reading
from coordinator.validation.schemas import ChatBody
from modeling.text.chat_template import RenderedChat
from protocol.errors import RequestError

MESSAGES = "messages"
ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
REASONING = ("reasoning_content", "reasoning")
NOT_SUPPORTED = (  # of a message
    "tool_calls",
    "function_call",
    "audio",
    "prefix",
    "partial",
    "images",
    "attachments",
    "file_ids",
)
SHOWN = ("name", "tool_call_id", *REASONING)  # what a template may show beside the content
KNOWN = frozenset({"role", "content", "refusal", "annotations", *SHOWN, *NOT_SUPPORTED})


def read_chat(
    reading: Reading,
    tenant: Tenant,
    fields: dict[str, Any],
    document: Named | None,
) -> Prepared | NeedsDocument:
    """The request that ``fields`` ask for; what it names first, if that has not been opened.

    Raises:
        RequestError: the request cannot be served as it is.
    """
    body = reading.begin(ChatBody, fields)
    if body.top_logprobs and not body.logprobs:
        raise RequestError(
            "top_logprobs needs logprobs: true", code="invalid_value", param="top_logprobs"
        )
    options = reading.options(
        body,
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    document_id, given = take_document(body.messages)
    messages = read_messages(reading, given)
    if document_id is not None and document is None:
        return NeedsDocument(document_id)
    if document is None:
        encoders: list[Encoder] = [lambda _tools: encode_messages(reading, messages)]
        prepared = reading.prepare(options, tenant, encoders, MESSAGES, None)
    else:
        check_system(document[0].document, messages, MESSAGES)
        reading.enter(Stage.ENCODING, _size(messages))
        made = chat_prompt(reading.tools, *document, messages)
        encoders = [lambda _tools: made.token_ids]
        prepared = reading.prepare(options, tenant, encoders, MESSAGES, made.attached)
    return msgspec.structs.replace(prepared, with_logprobs=bool(body.logprobs))


def encode_messages(reading: Reading, messages: list[dict[str, Any]]) -> list[int]:
    """Token ids of a conversation, up to where the answer begins.

    Raises:
        RequestError: ``template_error``.
    """
    tools = reading.tools
    reading.enter(Stage.RENDERING, _size(messages))
    rendered = RenderedChat(
        tools.chat_template, tools.tokenizer, messages, add_generation_prompt=True
    )
    reading.enter(Stage.ENCODING, len(rendered.text))
    return rendered.encode(rendered.text)


def _size(messages: list[dict[str, Any]]) -> int:
    return sum(len(_text(message)) for message in messages)


def _text(message: dict[str, Any]) -> str:
    """All that a template may show of it."""
    return "".join(message.get(name, "") for name in ("content", *REASONING))


def take_document(given: Any) -> tuple[str | None, Any]:  # noqa: ANN401 - a caller's JSON value
    """(the document that a conversation begins with, the messages without it).

    Only the first part of the first user message is looked at; one that stands elsewhere is refused
    where the content is read.

    Raises:
        RequestError: a document part without an id.
    """
    if not isinstance(given, list):
        return None, given
    for number, message in enumerate(given):
        if not isinstance(message, dict) or message.get("role") != "user":
            continue
        content = message.get("content")
        if not isinstance(content, list) or not content:
            return None, given
        part = content[0]
        if not isinstance(part, dict) or part.get("type") != "document":
            return None, given
        document_id = part.get("document_id")
        if not isinstance(document_id, str) or not 0 < len(document_id) <= 64:
            raise RequestError(
                f"messages[{number}].content[0].document_id must be the id of a document",
                code="invalid_type",
                param=MESSAGES,
            )
        shown = {**message, "content": content[1:] or ""}
        return document_id, [*given[:number], shown, *given[number + 1 :]]
    return None, given


def read_messages(reading: Reading, given: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - a caller's JSON value
    """Messages as a template takes them: every content is one string.

    Raises:
        RequestError: with param ``messages``.
    """
    limits = reading.limits
    if given is None:
        raise _refusal("messages is missing", "missing_required_parameter")
    if not isinstance(given, list):
        raise _refusal("messages must be a list", "invalid_type")
    if not given:
        raise _refusal("messages is empty", "invalid_value")
    if len(given) > limits.max_messages:
        raise _refusal(
            f"{len(given)} messages, at most {limits.max_messages} are served", "invalid_value"
        )
    messages = [_message(number, message, limits) for number, message in enumerate(given)]
    reading.unknown_fields.note_message(set().union(*given) - KNOWN)
    reading.check_text("".join(map(_text, messages)), "messages")
    return messages


def _message(number: int, given: Any, limits: Limits) -> dict[str, Any]:  # noqa: ANN401 - a caller's JSON value
    where = f"messages[{number}]"
    if not isinstance(given, dict):
        raise _refusal(f"{where} must be an object", "invalid_type")
    role = given.get("role")
    if not isinstance(role, str):
        raise _refusal(f"{where}.role must be a string", "invalid_type")
    if role not in ROLES:
        raise _refusal(f"{where}.role must be one of {', '.join(sorted(ROLES))}", "invalid_value")
    for name in NOT_SUPPORTED:
        if given.get(name):
            raise _refusal(f"{where}.{name} is not supported", "unsupported_parameter")
    if role == "tool" and not isinstance(given.get("tool_call_id"), str):
        raise _refusal(f"{where}.tool_call_id is missing", "missing_required_parameter")
    content = _content(where, role, given.get("content"), limits)
    if role == "assistant" and not content:
        content = _refusal_text(where, given.get("refusal"))
    return {"role": role, "content": content, **_other_fields(where, given)}


def _other_fields(where: str, given: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in SHOWN:
        value = given.get(name)
        if value is None:
            continue
        if not isinstance(value, str) or (len(value) > 256 and name not in REASONING):
            raise _refusal(f"{where}.{name} must be a short string", "invalid_type")
        found[name] = value
    return found


def _content(where: str, role: str, content: Any, limits: Limits) -> str:  # noqa: ANN401 - a caller's JSON value
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list):
        raise _refusal(f"{where}.content must be a string or a list of parts", "invalid_type")
    if not content:
        raise _refusal(f"{where}.content is empty", "invalid_value")
    if len(content) > limits.max_content_parts:
        raise _refusal(
            f"{where}.content has {len(content)} parts, at most {limits.max_content_parts} are "
            f"served",
            "invalid_value",
        )
    # As vLLM joins them: a part is a paragraph, not a piece of a word.
    return "\n".join(_text_of_part(where, role, part) for part in content)


def _text_of_part(where: str, role: str, part: Any) -> str:  # noqa: ANN401 - a caller's JSON value
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "refusal" and role == "assistant":
        return _refusal_text(where, part.get("refusal"))
    if kind == "document":
        raise _refusal(
            f"{where}.content: a document must be the first part of the first user message",
            "unsupported_content",
        )
    is_short_form = isinstance(part, dict) and part.keys() == {"text"}  # vLLM takes it too
    if kind != "text" and not is_short_form:
        raise _refusal(
            f"{where}.content has a part of type {str(kind)[:32]!r}: only text is read",
            "unsupported_content",
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise _refusal(f"{where}.content has a text part without text", "invalid_type")
    return text


def _refusal_text(where: str, given: Any) -> str:  # noqa: ANN401 - a caller's JSON value
    """What an earlier answer said in the place of its content."""
    if given is not None and not isinstance(given, str):
        raise _refusal(f"{where}.refusal must be a string", "invalid_type")
    return given or ""


def _refusal(message: str, code: str) -> RequestError:
    return RequestError(message, code=code, param="messages")
