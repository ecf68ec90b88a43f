"""A body of ``/v1/chat/completions`` to a request: messages through the model's own chat template.

The template is code that came with the checkpoint: it runs here, in a text worker, only.
"""

import json
from typing import Any

import msgspec

from coordinator.auth import Tenant
from coordinator.config import Limits
from coordinator.errors import invalid_value, unsupported
from coordinator.jobs.questions.prompts import chat_prompt, check_system
from coordinator.text.tasks import NeedsDocument, Parsing, Prepared, Stage
from coordinator.validation.forms import read_form
from coordinator.validation.parameters import Options
from coordinator.validation.reading import Named, Reading
from coordinator.validation.schemas import ChatBody, TokenizeBody
from coordinator.validation.tools import Offer, read_calls, read_offer
from modeling.text.chat_template import RenderedChat
from modeling.text.parsers.formats import NONE
from protocol.errors import RequestError

MESSAGES = "messages"
ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
REASONING = ("reasoning_content", "reasoning")
PROMPT_END_CHARS = 256  # of a prompt, by which it is seen whether it has begun the reasoning
# of a message
NOT_SUPPORTED = "function_call audio prefix partial images attachments file_ids".split()
SHOWN = ("name", "tool_call_id", *REASONING)  # what a template may show beside the content
KNOWN = frozenset(
    {"role", "content", "refusal", "annotations", "tool_calls", *SHOWN, *NOT_SUPPORTED}
)


def read_chat(
    reading: Reading, tenant: Tenant, fields: dict[str, Any], document: Named | None
) -> Prepared | NeedsDocument:
    """The request that ``fields`` ask for; what it names first, if that has not been opened.

    Raises:
        RequestError: the request cannot be served as it is.
    """
    body = reading.begin(ChatBody, fields)
    if body.top_logprobs and not body.logprobs:
        raise invalid_value("top_logprobs", "top_logprobs needs logprobs: true")
    options = reading.options(body, (body.top_logprobs or 0) if body.logprobs else None)
    document_id, given = take_document(body.messages)
    messages = read_messages(reading, given)
    offer = read_offer(reading.tools, body.tools, body.tool_choice, body.parallel_tool_calls)
    if document_id is not None and document is None:
        return NeedsDocument(document_id)
    if document is None:
        text, token_ids = render_chat(reading, messages, body, offer)
        attached = None
    else:
        _check_plain(body)
        check_system(document[0].document, messages, MESSAGES)
        reading.enter(Stage.ENCODING, _size(messages))
        made = chat_prompt(reading.tools, *document, messages)
        text, token_ids, attached = "", list(made.token_ids), made.attached
    options = _held_to(reading, options, body, offer, text)
    prepared = reading.prepare(options, tenant, [lambda: token_ids], MESSAGES, attached)
    called = offer.tools if offer is not None and offer.choice != "none" else ()
    is_read = body.separate_reasoning is not False or called
    if is_read and (called or reading.tools.format.reasoning_parser != NONE):
        shows_reasoning = body.include_reasoning is not False
        parsing = Parsing(called, text[-PROMPT_END_CHARS:], shows_reasoning)
        return msgspec.structs.replace(prepared, parsing=parsing)
    return prepared


def _held_to(
    reading: Reading, options: Options, body: ChatBody, offer: Offer | None, prompt: str
) -> Options:
    """The options with the grammar of what is asked for: a form, or calls."""
    asked, spell = read_form(body), reading.spell
    if asked is not None and offer is not None and offer.choice != "none":
        # Either might come, and none of the two grammars has room for the other.
        message = f"{asked[1]} cannot be had together with tools: give one, or tool_choice none"
        raise unsupported(asked[1], message)
    if asked is None:
        grammar = None if offer is None else offer.grammar(reading.tools, spell)
        asked = None if grammar is None else (grammar, "tools")
    if asked is None:
        return options
    grammar, param = asked
    if offer is None or offer.is_forced:
        grammar = reading.after_reasoning(grammar, prompt, param)
    return reading.with_grammar(options, grammar, param)


def render_chat(
    reading: Reading,
    messages: list[dict[str, Any]],
    body: ChatBody | TokenizeBody,
    offer: Offer | None,
) -> tuple[str, list[int]]:
    """(text, token ids) of a conversation, up to where the answer begins.

    Raises:
        RequestError: ``template_error``, or what the template does not have.
    """
    tools = reading.tools
    reading.enter(Stage.RENDERING, _size(messages))
    continues = bool(body.continue_final_message)
    if continues and (body.add_generation_prompt or messages[-1]["role"] != "assistant"):
        raise invalid_value(
            "continue_final_message",
            "continue_final_message goes on with the last message: it must be an assistant's, and "
            "add_generation_prompt false",
        )
    rendered = RenderedChat(
        tools.chat_template,
        tools.tokenizer,
        messages,
        continues_last=continues,
        add_generation_prompt=not continues and body.add_generation_prompt is not False,
        tools=None if offer is None else list(offer.shown),
        variables=_variables(reading, body),
    )
    reading.enter(Stage.ENCODING, len(rendered.text))
    return rendered.text, rendered.encode(rendered.text)


def _variables(reading: Reading, body: ChatBody | TokenizeBody) -> dict[str, Any]:
    """What the template is told beside the messages.

    A name that it does not have would be ignored, and is refused; not so the server's defaults.
    """
    known = reading.tools.chat_template.variables
    given = dict(body.chat_template_kwargs or {})
    if isinstance(body, ChatBody) and body.reasoning_effort is not None:
        if "reasoning_effort" not in known and body.reasoning_effort != "none":
            message = "this model's chat template knows no reasoning_effort"
            raise unsupported("reasoning_effort", message)
        given.setdefault("reasoning_effort", body.reasoning_effort)
        if body.reasoning_effort == "none" and "enable_thinking" in known:
            given.setdefault("enable_thinking", False)
    for name in given.keys() - known:
        if name == "reasoning_effort":
            continue
        raise unsupported(
            "chat_template_kwargs",
            f"chat_template_kwargs.{name[:64]}: this model's chat template does not use it; it "
            f"uses {', '.join(sorted(known - _GIVEN)) or 'none'}",
        )
    return {**reading.config.default_chat_template_kwargs, **given}


_GIVEN = frozenset(
    {"messages", "tools", "add_generation_prompt", "documents", "bos_token", "eos_token"}
)


def _check_plain(body: ChatBody) -> None:
    """A document's prompt is the same in every request: what would change it is refused."""
    for name in ("tools", "chat_template_kwargs", "reasoning_effort", "continue_final_message"):
        if getattr(body, name):
            raise unsupported(name, f"{name} cannot be had together with a document")


def _size(messages: list[dict[str, Any]]) -> int:
    return sum(len(_text(message)) for message in messages)


def _text(message: dict[str, Any]) -> str:
    """All that a template may show of it."""
    shown = [message.get(name, "") for name in ("content", *REASONING)]
    for call in message.get("tool_calls", ()):
        shown.append(json.dumps(call["function"], ensure_ascii=False))
    return "".join(shown)


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
            where = f"messages[{number}].content[0].document_id"
            raise _refusal(f"{where} must be the id of a document", "invalid_type")
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
    message: dict[str, Any] = {"role": role, "content": content, **_other_fields(where, given)}
    if given.get("tool_calls"):
        if role != "assistant":
            raise _refusal(f"{where}.tool_calls is an assistant's", "invalid_value")
        message["tool_calls"] = read_calls(where, given["tool_calls"])
    return message


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
    return invalid_value(MESSAGES, message, code)
