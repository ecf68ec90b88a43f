"""The prompt of a request that begins with a document; made where texts become tokens.

It begins with the document's own tokens. When they were made in another form, by another tokenizer
or template, or of another text in front of the document, everything is encoded anew. ``Attached``
then compares what was found in the caches with what was promised.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from coordinator.jobs.documents.document import CHAT, TEXT, Document
from coordinator.jobs.questions.canonical import first_user, joined, show
from coordinator.text.tokenizing import TextTools
from modeling.text.chat_template import encode_chat
from protocol.errors import RequestError

PREFIX_CHANGED, WORKER_LOST = "prefix_changed", "worker_lost"


@dataclass(frozen=True, slots=True)
class Attached:
    """A document that a prompt begins with. ``missing`` is why none of it can be found, if so."""

    document_id: str
    cache_salt: str
    num_promised: int
    likely: str  # why blocks may be missing that should be there
    missing: str | None = None

    def salted(self, salt: str, *, is_own: bool) -> tuple[str, "Attached"]:
        """The salt of a prompt's hashes: the document's, unless the caller brings its own."""
        if is_own and salt != self.cache_salt:
            return salt, self.missed(PREFIX_CHANGED)
        return self.cache_salt, self

    def missed(self, reason: str) -> "Attached":
        """Why none of it can be found, unless a reason is known already."""
        return replace(self, missing=self.missing or reason)

    def cache_miss(self, num_cached: int, *, is_retried: bool) -> dict[str, Any] | None:
        """What to tell the caller of a prompt of which ``num_cached`` tokens were found."""
        missed = self.num_promised - num_cached
        if missed <= 0:
            return None
        reason = self.missing or (WORKER_LOST if is_retried else self.likely)
        return {"reason": reason, "missed_tokens": missed}


@dataclass(frozen=True, slots=True)
class Opened:
    """A document that a prompt may begin with; its files are in ``folder``, for a text worker.

    ``has_tokens`` says whether its tokens are what the model's tokenizer and template make now.
    """

    folder: str
    document: Document
    attached: Attached
    has_tokens: bool


@dataclass(frozen=True, slots=True)
class Contents:
    """Of an opened document, read when they are asked for."""

    tokens: Callable[[], Sequence[int]]
    text: Callable[[], str]


@dataclass(frozen=True, slots=True)
class Beginning:
    """How a prompt begins, or all of it, and what is told of the document then."""

    token_ids: Sequence[int]
    attached: Attached


def chat_prompt(
    tools: TextTools, opened: Opened, contents: Contents, messages: Sequence[Mapping[str, Any]]
) -> Beginning:
    """The whole prompt of a conversation in whose first user message the document stands first.

    It begins with the tokens that are stored if what stands there now is what they were made of;
    else everything is encoded from the document's text.

    Args:
        tools: of the model.
        opened: the document.
        contents: of it.
        messages: without the document.

    Raises:
        RequestError: the template cannot show it, or the document cannot be read.
    """
    document, attached = opened.document, opened.attached
    if document.kind == "token_ids":  # of form chat they begin as a prompt of the model's does
        shown = show(tools, "", messages)
        is_same = document.form == CHAT
        before = [] if is_same else shown.encode_head()
        token_ids = [*before, *contents.tokens(), *shown.encode_rest()]
        return Beginning(token_ids, attached if is_same else attached.missed(PREFIX_CHANGED))
    text = contents.text()
    shown = show(tools, text, messages)
    if opened.has_tokens and document.form == CHAT:
        stored = contents.tokens() if shown.digest == document.shown else None
    else:
        head = shown.encode_head()
        stored = head if opened.has_tokens and head == list(contents.tokens()) else None
    if stored is not None:
        return Beginning([*stored, *shown.encode_rest()], attached)
    place = first_user(messages)
    assert place is not None, "checked when the document was found in the message"
    whole = [dict(message) for message in messages]
    whole[place]["content"] = joined(text, whole[place]["content"])
    token_ids = encode_chat(tools.chat_template, tools.tokenizer, whole)
    return Beginning(token_ids, attached.missed(PREFIX_CHANGED))


def completion_beginning(tools: TextTools, opened: Opened, contents: Contents) -> Beginning:
    """What the prompts of a completion go on behind.

    Raises:
        RequestError: the document cannot be read.
    """
    document, attached = opened.document, opened.attached
    if document.kind == "token_ids":
        return Beginning(contents.tokens(), attached)
    if opened.has_tokens and document.form == TEXT:
        return Beginning(contents.tokens(), attached)
    token_ids = tools.tokenizer.encode(contents.text())
    is_same = opened.has_tokens and token_ids == list(contents.tokens())
    return Beginning(token_ids, attached if is_same else attached.missed(PREFIX_CHANGED))


def completion_tokens(
    tools: TextTools, beginning: Sequence[int], prompt: str | Sequence[int]
) -> list[int]:
    """The prompt of a completion that goes on behind the document."""
    rest = prompt
    if isinstance(rest, str):
        rest = tools.tokenizer.encode(rest, add_special_tokens=False) if rest else []
    return [*beginning, *rest]


def check_system(document: Document, messages: Sequence[Mapping[str, Any]], param: str) -> None:
    """The messages before the document are those that it was ingested with.

    Raises:
        RequestError: they are not.
    """
    place = first_user(messages)
    before = [(m["role"], m["content"]) for m in messages[:place]]
    if before != [(m.role, m.content) for m in document.system]:
        raise RequestError(
            "what stands before the document must be what it was ingested with: give its system "
            "message in source.messages when you ingest it, and the same in every question",
            code="document_prefix",
            param=param,
        )
