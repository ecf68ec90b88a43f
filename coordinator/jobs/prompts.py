"""The prompt of a request that begins with a document; made where texts become tokens.

It begins with the document's own tokens, or, when the document was ingested in another form or for
another model, everything is encoded anew. ``Attached`` then compares what was found in the caches
with what was promised.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from coordinator.jobs.canonical import encode_before, encode_rest, first_user, joined
from coordinator.jobs.document import Document
from coordinator.tokenizing import TextTools
from modeling.chat_template import encode_chat
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
            return salt, replace(self, missing=self.missing or PREFIX_CHANGED)
        return self.cache_salt, self

    def cache_miss(self, num_cached: int, *, is_retried: bool) -> dict[str, Any] | None:
        """What to tell the caller of a prompt of which ``num_cached`` tokens were found."""
        missed = self.num_promised - num_cached
        if missed <= 0:
            return None
        reason = self.missing or (WORKER_LOST if is_retried else self.likely)
        return {"reason": reason, "missed_tokens": missed}


@dataclass(frozen=True, slots=True)
class Opened:
    """A document that a prompt may begin with: its tokens, if ``uses_tokens``, else its text.

    They are in ``folder``, for a text worker to read.
    """

    folder: str
    document: Document
    attached: Attached
    uses_tokens: bool


@dataclass(frozen=True, slots=True)
class Contents:
    """Of an opened document: either its tokens or its text."""

    token_ids: Sequence[int] = ()
    text: str | None = None


def chat_tokens(
    tools: TextTools,
    attached: Attached,
    contents: Contents,
    messages: Sequence[Mapping[str, Any]],
) -> list[int]:
    """The prompt of a conversation in whose first user message the document stands first.

    Args:
        tools: of the model.
        attached: the document, opened for form ``chat``.
        contents: of it.
        messages: without the document.
    """
    if contents.text is None:
        before = encode_before(tools, messages) if attached.missing else []
        return [*before, *contents.token_ids, *encode_rest(tools, messages)]
    place = first_user(messages)
    assert place is not None, "checked when the document was found in the message"
    shown = [dict(message) for message in messages]
    shown[place]["content"] = joined(contents.text, shown[place]["content"])
    return encode_chat(tools.chat_template, tools.tokenizer, shown)


def completion_tokens(
    tools: TextTools, contents: Contents, prompt: str | Sequence[int]
) -> list[int]:
    """The prompt of a completion that goes on behind the document."""
    rest = prompt
    if isinstance(rest, str):
        rest = tools.tokenizer.encode(rest, add_special_tokens=False) if rest else []
    if contents.text is None:
        return [*contents.token_ids, *rest]
    return [*tools.tokenizer.encode(contents.text), *rest]


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
