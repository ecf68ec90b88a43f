"""``/v1/chat/completions``: messages in, through the model's own chat template."""

from typing import Any

from coordinator.answer import Answer
from coordinator.config import Limits
from coordinator.document_parts import chat_encoder, take_document
from coordinator.frontend import Asker, Frontend
from coordinator.parameters import read_options
from coordinator.schemas import ChatBody, validate
from coordinator.shapes import ChatShape
from coordinator.tokenizing import TextTools
from modeling.chat_template import encode_chat
from protocol.errors import RequestError

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


async def chat(frontend: Frontend, asker: Asker, fields: dict[str, Any]) -> Answer:
    """The answer to a chat request.

    Raises:
        RequestError: the request cannot be served as it is.
    """
    body = validate(ChatBody, fields)
    frontend.unknown_fields.note(ChatBody, fields)
    frontend.check_model(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError(
            "top_logprobs needs logprobs: true", code="invalid_value", param="top_logprobs"
        )
    options = read_options(
        body,
        max_tokens=(
            body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        ),
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        model=frontend.model,
        limits=frontend.config.limits,
    )
    document_id, given = take_document(body.messages)
    messages = read_messages(frontend, given)
    if document_id is None:
        choices = await frontend.prepare(
            asker, options, [lambda tools: encode_messages(tools, messages)], "messages"
        )
    else:
        encoder, attached = await chat_encoder(frontend, asker, document_id, messages)
        choices = await frontend.prepare(asker, options, [encoder], "messages", attached)
    shape = ChatShape(
        return_token_ids=options.return_token_ids,
        with_logprobs=bool(body.logprobs),
        bytes_of=frontend.tokenization.tools.tokenizer.token_bytes,
    )
    return Answer(frontend, asker, options, choices, shape)


def encode_messages(tools: TextTools, messages: list[dict[str, Any]]) -> list[int]:
    """Token ids of a conversation, up to where the answer begins.

    Raises:
        RequestError: ``template_error``.
    """
    return encode_chat(tools.chat_template, tools.tokenizer, messages)


def read_messages(frontend: Frontend, given: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - a caller's JSON value
    """Messages as a template takes them: every content is one string.

    Raises:
        RequestError: with param ``messages``.
    """
    limits = frontend.config.limits
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
    frontend.check_text("".join(message["content"] for message in messages), "messages")
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
    if given.get("tool_calls"):
        raise _refusal(f"{where}.tool_calls is not supported", "unsupported_parameter")
    if role == "tool" and not isinstance(given.get("tool_call_id"), str):
        raise _refusal(f"{where}.tool_call_id is missing", "missing_required_parameter")
    message = {"role": role, "content": _content(where, role, given.get("content"), limits)}
    for name in ("name", "tool_call_id"):
        value = given.get(name)
        if value is not None:
            if not isinstance(value, str) or len(value) > 256:
                raise _refusal(f"{where}.{name} must be a short string", "invalid_type")
            message[name] = value
    return message


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
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "document":
            raise _refusal(
                f"{where}.content: a document must be the first part of the first user message",
                "unsupported_content",
            )
        if kind != "text":
            raise _refusal(
                f"{where}.content has a part of type {str(kind)[:32]!r}: only text is read",
                "unsupported_content",
            )
        if not isinstance(part.get("text"), str):
            raise _refusal(f"{where}.content has a text part without text", "invalid_type")
        texts.append(part["text"])
    return "".join(texts)


def _refusal(message: str, code: str) -> RequestError:
    return RequestError(message, code=code, param="messages")
