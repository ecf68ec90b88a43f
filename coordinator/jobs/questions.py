"""A request that names a document: its tokens come first, and what was missed of them is told.

1. ``open`` finds the document, which must be the caller's and usable.
2. ``chat_tokens`` or ``completion_tokens`` make the prompt: the document's own tokens and the rest,
   or, when it was ingested in another form, everything anew.
3. When the answer is done, ``Attached.cache_miss`` compares what was found with what was promised.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from coordinator.jobs.canonical import (
    encode_before,
    encode_document,
    encode_rest,
    first_user,
    joined,
)
from coordinator.jobs.document import TEXT, Document
from coordinator.jobs.documents import Documents
from coordinator.jobs.states import PENDING, USABLE, State
from coordinator.tokenizing import TextTools
from modeling.chat_template import encode_chat
from protocol.errors import RequestError

MODEL_CHANGED, PREFIX_CHANGED = "model_changed", "prefix_changed"
EVICTED, EXPIRED, WORKER_LOST = "evicted", "expired", "worker_lost"


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
    """A document with what its prompts are made of."""

    document: Document
    attached: Attached
    token_ids: tuple[int, ...] = ()  # if they serve
    text: str | None = None  # read only if they do not


class Questions:
    """Makes prompts that begin with documents.

    Args:
        documents: all of them.
    """

    def __init__(self, documents: Documents) -> None:
        self._documents = documents

    async def open(self, tenant: str, document_id: str, form: str, param: str) -> Opened:
        """A document for a question in ``form``.

        Raises:
            RequestError: it is not the tenant's (404), not ready (409), or cannot be used so (400).
        """
        try:
            document = await self._documents.get(tenant, document_id)
        except RequestError as error:
            error.param = param
            raise
        _check_usable(document, param)
        if form == TEXT and document.kind == "messages":
            raise RequestError(
                "this document was made of messages: ask about it in /v1/chat/completions",
                code="document_form",
                param=param,
            )
        is_current = self._documents.library.has_tokens(document)
        missing = None if is_current else MODEL_CHANGED
        if is_current and document.form != form and not await self._is_same(document, form):
            missing = PREFIX_CHANGED
        document = await self._documents.keeper.check_blocks(document)
        attached = Attached(
            document_id=document.document_id,
            cache_salt=document.cache_salt,
            num_promised=document.num_promised,
            likely=EXPIRED if document.pin.has_expired else EVICTED,
            missing=missing,
        )
        await self._documents.touch(document)
        if missing is None or (document.kind == "token_ids" and missing == PREFIX_CHANGED):
            prompt = await self._documents.library.prompt(document)
            return Opened(document, attached, token_ids=prompt.token_ids)
        return Opened(document, attached, text=await self._documents.library.text(document))

    async def _is_same(self, document: Document, form: str) -> bool:
        """Whether both forms give the same tokens: where a template shows a message as it is."""
        if document.kind == "token_ids":
            return form == TEXT  # in a completion they are taken as they are
        token_ids = (await self._documents.library.prompt(document)).token_ids
        text = await self._documents.library.text(document)
        return await self._documents.library.run(
            lambda tools: tuple(encode_document(tools, text, form, ())) == token_ids
        )


def chat_tokens(
    tools: TextTools, opened: Opened, messages: Sequence[Mapping[str, Any]]
) -> list[int]:
    """The prompt of a conversation in whose first user message the document stands first.

    Args:
        tools: of the model.
        opened: for form ``chat``.
        messages: without the document.
    """
    if opened.text is None:
        before = encode_before(tools, messages) if opened.attached.missing else []
        return [*before, *opened.token_ids, *encode_rest(tools, messages)]
    place = first_user(messages)
    assert place is not None, "checked when the document was found in the message"
    shown = [dict(message) for message in messages]
    shown[place]["content"] = joined(opened.text, shown[place]["content"])
    return encode_chat(tools.chat_template, tools.tokenizer, shown)


def completion_tokens(tools: TextTools, opened: Opened, prompt: str | Sequence[int]) -> list[int]:
    """The prompt of a completion that goes on behind the document."""
    rest = prompt
    if isinstance(rest, str):
        rest = tools.tokenizer.encode(rest, add_special_tokens=False) if rest else []
    if opened.text is None:
        return [*opened.token_ids, *rest]
    return [*tools.tokenizer.encode(opened.text), *rest]


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


def _check_usable(document: Document, param: str) -> None:
    if document.state in USABLE:
        return
    if document.state in PENDING:
        raise RequestError(
            f"the document is {document.status}: wait for it with "
            f"GET /v1/documents/{document.document_id}?wait=60",
            code="document_not_ready",
            param=param,
            status=409,
        )
    why = ""
    if document.state is State.FAILED and document.error is not None:
        why = f" ({document.error.message})"
    raise RequestError(
        f"the document is {document.status}{why}: resume it, or ingest it again",
        code="document_not_usable",
        param=param,
    )
