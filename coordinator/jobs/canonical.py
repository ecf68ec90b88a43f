"""The tokens of a document, and of a question about it, so that the second begins with the first.

*chat*: the model's template shows a conversation whose first user message begins with the document.
What stands before the document, and the document, are encoded as one text; what stands behind is
encoded by itself. The place is found with a mark that occurs in no message.

*text*: the document as a plain text, with the special tokens that the tokenizer puts around one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from coordinator.jobs.document import TEXT
from coordinator.tokenizing import TextTools
from modeling.chat_template import RenderedChat
from protocol.errors import RequestError

MARKS = range(0xF0000, 0xF0100)  # private use, apart from the template's own guards
Messages = Sequence[Mapping[str, Any]]


def encode_document(tools: TextTools, text: str, form: str, system: Messages) -> list[int]:
    """Token ids of a document.

    Args:
        tools: of the model.
        text: the document.
        form: ``CHAT`` or ``TEXT``.
        system: the messages before the one that holds it; of *chat*.

    Raises:
        RequestError: the template cannot show it.
    """
    if form == TEXT:
        return tools.tokenizer.encode(text)
    mark = _mark([text, *system])
    rendered = _render(tools, [*system, {"role": "user", "content": text + mark}])
    before, _ = _parted(rendered, mark)
    return rendered.encode(before)


def encode_rest(tools: TextTools, messages: Messages) -> list[int]:
    """Token ids of a conversation from behind its document.

    Args:
        tools: of the model.
        messages: the document is where the first user message begins, and left out of it.

    Raises:
        RequestError: the template cannot show it.
    """
    rendered, mark = _marked(tools, messages)
    return rendered.encode(_parted(rendered, mark)[1])


def encode_before(tools: TextTools, messages: Messages) -> list[int]:
    """Token ids of the same conversation up to where the document begins."""
    rendered, mark = _marked(tools, messages)
    return rendered.encode(_parted(rendered, mark)[0])


def joined(text: str, rest: str) -> str:
    """A document and what is asked of it, apart as two paragraphs are."""
    return text + apart(rest)


def apart(rest: str) -> str:
    """What follows a document in its message."""
    return f"\n\n{rest}" if rest and not rest[0].isspace() else rest


def first_user(messages: Messages) -> int | None:
    """The place of the first user message."""
    return next((i for i, message in enumerate(messages) if message["role"] == "user"), None)


def _marked(tools: TextTools, messages: Messages) -> tuple[RenderedChat, str]:
    place = first_user(messages)
    assert place is not None, "a document is part of a user message"
    mark = _mark(messages)
    shown = [dict(message) for message in messages]
    shown[place]["content"] = mark + apart(shown[place]["content"])
    return _render(tools, shown), mark


def _render(tools: TextTools, messages: Messages) -> RenderedChat:
    return RenderedChat(tools.chat_template, tools.tokenizer, messages, add_generation_prompt=True)


def _mark(texts: Sequence[Any]) -> str:
    everything = "".join(map(str, texts))
    return next(chr(point) for point in MARKS if chr(point) not in everything)


def _parted(rendered: RenderedChat, mark: str) -> tuple[str, str]:
    pieces = rendered.text.split(mark)
    if len(pieces) != 2:
        raise RequestError(
            "the model's chat template does not show a user message as it is: "
            "use the document with form 'text'",
            code="template_error",
            param="messages",
        )
    return pieces[0], pieces[1]
