"""The tokens of a document, and of a question about it, so that the second begins with the first.

*chat*: the model's template shows a conversation whose first user message begins with the document.
What stands before the document, and the document, are the *head*, which is encoded as one text;
what stands behind is encoded by itself. The place is found with a mark that occurs in no message.

*text*: the document as a plain text, with the special tokens that the tokenizer puts around one.

A template may show the head of one conversation otherwise than that of another: it may tell the
date, or put the system's text into the last turn. So the head is rendered for every question, and
its digest compared with that of the head whose tokens are stored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from coordinator.jobs.documents.document import TEXT
from coordinator.text.tokenizing import TextTools
from modeling.text.chat_template import RenderedChat
from protocol.errors import RequestError

MARKS = range(0xF0000, 0xF0100)  # private use, apart from the template's own guards
ANOTHER_DAY = timedelta(days=400, hours=1, minutes=1, seconds=1)  # other in whatever is told of it
FOLLOW_UP = ({"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"})
DATE, TURNS = "the date", "the number of turns"
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Shown:
    """A conversation as the template shows it, in two pieces: ``head`` ends with the document."""

    rendered: RenderedChat
    head: str
    rest: str

    @property
    def digest(self) -> str:
        """Of the head."""
        return self.rendered.digest(self.head)

    def encode_head(self) -> list[int]:
        """Its token ids."""
        return self.rendered.encode(self.head)

    def encode_rest(self) -> list[int]:
        """Its token ids."""
        return self.rendered.encode(self.rest)


def show(tools: TextTools, text: str, messages: Messages, now: datetime | None = None) -> Shown:
    """A conversation in whose first user message a document stands first.

    Args:
        tools: of the model.
        text: the document.
        messages: without it.
        now: local time, for templates that tell it; None takes the clock's.

    Raises:
        RequestError: the template cannot show it.
    """
    place = first_user(messages)
    assert place is not None, "a document is part of a user message"
    mark = _mark([text, *messages])
    shown = [dict(message) for message in messages]
    shown[place]["content"] = text + mark + apart(shown[place]["content"])
    rendered = RenderedChat(
        tools.chat_template, tools.tokenizer, shown, add_generation_prompt=True, now=now
    )
    return Shown(rendered, *_parted(rendered.text, mark))


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """``shown`` is the digest of the head, ``varies_with`` what else the head depends on."""

    token_ids: list[int]
    shown: str = ""
    varies_with: tuple[str, ...] = ()


def encode_document(
    tools: TextTools, text: str, form: str, system: Messages, now: datetime
) -> EncodedDocument:
    """A document's tokens.

    Args:
        tools: of the model.
        text: the document.
        form: ``CHAT`` or ``TEXT``.
        system: the messages before the one that holds it; of *chat*.
        now: local time.

    Raises:
        RequestError: the template cannot show it.
    """
    if form == TEXT:
        return EncodedDocument(tools.tokenizer.encode(text))
    alone = [*system, {"role": "user", "content": ""}]
    shown = show(tools, text, alone, now)
    others = {DATE: (alone, now + ANOTHER_DAY), TURNS: ([*alone, *FOLLOW_UP], now)}
    digests = {name: _digest(tools, text, *other) for name, other in others.items()}
    varies_with = tuple(name for name in others if digests[name] not in (shown.digest, None))
    return EncodedDocument(shown.encode_head(), shown.digest, varies_with)


def _digest(tools: TextTools, text: str, messages: Messages, now: datetime) -> str | None:
    try:
        return show(tools, text, messages, now).digest
    except RequestError:  # of a template that takes no second turn: then there is none
        return None


def joined(text: str, rest: str) -> str:
    """A document and what is asked of it, apart as two paragraphs are."""
    return text + apart(rest)


def apart(rest: str) -> str:
    """What follows a document in its message."""
    return f"\n\n{rest}" if rest and not rest[0].isspace() else rest


def first_user(messages: Messages) -> int | None:
    """The place of the first user message."""
    return next((i for i, message in enumerate(messages) if message["role"] == "user"), None)


def _mark(texts: Sequence[Any]) -> str:
    everything = "".join(map(str, texts))
    return next(chr(point) for point in MARKS if chr(point) not in everything)


def _parted(text: str, mark: str) -> tuple[str, str]:
    pieces = text.split(mark)
    if len(pieces) != 2:
        raise RequestError(
            "the model's chat template does not show a user message as it is: "
            "use the document with form 'text'",
            code="template_error",
            param="messages",
        )
    return pieces[0], pieces[1]
