"""What a document's tokens and block hashes are, kept at hand while it is in use.

Reading and hashing a long document takes a fraction of a second: it is done in a tokenizer thread,
and the latest few are kept.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from coordinator.jobs.canonical import encode_document
from coordinator.jobs.document import Document
from coordinator.jobs.document_files import TOKENS, DocumentFiles
from coordinator.jobs.formats import unprocessable
from coordinator.tokenizing import Prompt, TextTools, Tokenization, as_prompt
from protocol.errors import RequestError

T = TypeVar("T")
MAX_KEPT_TOKENS = 2 << 20


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The model that is served now."""

    name: str
    fingerprint: str
    block_size: int


class Library:
    """All documents' tokens.

    Args:
        files: where they lie.
        tokenization: of the model.
        facts: of the model.
    """

    def __init__(self, files: DocumentFiles, tokenization: Tokenization, facts: ModelFacts) -> None:
        self.facts = facts
        self._files = files
        self._tokenization = tokenization
        self._kept: OrderedDict[str, Prompt] = OrderedDict()

    def is_current(self, document: Document) -> bool:
        """Whether its tokens are those of the model that is served."""
        return document.num_tokens > 0 and (
            (document.fingerprint, document.block_size)
            == (self.facts.fingerprint, self.facts.block_size)
        )

    async def prompt(self, document: Document) -> Prompt:
        """Tokens and hashes of a document whose tokens are current.

        Raises:
            RequestError: ``document_damaged``.
        """
        kept = self._kept.get(document.document_id)
        if kept is not None:
            self._kept.move_to_end(document.document_id)
            return kept
        prompt = await self._tokenization.run(lambda tools: self._load(tools, document))
        self._keep(document.document_id, prompt)
        return prompt

    async def encode(self, document: Document, max_tokens: int) -> Prompt:
        """Make the tokens of a document from its text, and keep them on the disk.

        Raises:
            RequestError: it has no tokens, too many, or is of another model's.
        """

        def work(tools: TextTools) -> Prompt:
            if document.kind == "token_ids":
                token_ids = self._own_tokens(document)
            else:
                token_ids = tuple(self._encoded(tools, document))
            check_size(len(token_ids), max_tokens)
            if document.kind != "token_ids":
                self._files.write_tokens(document.document_id, token_ids)
            return self._hashed(document, token_ids)

        encoding = asyncio.ensure_future(self._tokenization.run(work))
        try:
            prompt = await asyncio.shield(encoding)
        except asyncio.CancelledError:
            # No thread stops: it must not write a file of a document that is deleted next.
            await asyncio.wait({encoding})
            encoding.exception()
            raise
        self._keep(document.document_id, prompt)
        return prompt

    async def hashed(self, document: Document, token_ids: tuple[int, ...]) -> Prompt:
        """Token ids that the caller gave, with their hashes."""
        prompt = await self._tokenization.run(lambda _tools: self._hashed(document, token_ids))
        self._keep(document.document_id, prompt)
        return prompt

    async def text(self, document: Document) -> str:
        """The text of a document that has one.

        Raises:
            RequestError: it was given as token ids, or its file is damaged.
        """
        if document.kind == "token_ids":
            raise RequestError(
                "this document was given as token ids of another model: ingest it again",
                code="document_model_changed",
                param="document_id",
                status=409,
            )
        return await self._tokenization.run(
            lambda _tools: self._files.read_text(document.document_id)
        )

    async def run(self, work: Callable[[TextTools], T]) -> T:
        """``work`` in a thread of the documents."""
        return await self._tokenization.run(work)

    def is_at_hand(self, document: Document) -> bool:
        """Whether nothing is read or made for ``prompt``."""
        return document.document_id in self._kept or not self.has_tokens(document)

    def forget(self, document_id: str) -> None:
        self._kept.pop(document_id, None)

    def _own_tokens(self, document: Document) -> tuple[int, ...]:
        if document.fingerprint and document.fingerprint != self.facts.fingerprint:
            raise RequestError(
                "these are token ids of another model than is served now: ingest it again",
                code="document_model_changed",
                status=409,
            )
        return self._files.read_tokens(document.document_id)

    def _encoded(self, tools: TextTools, document: Document) -> list[int]:
        text = self._files.read_text(document.document_id)
        system = [{"role": m.role, "content": m.content} for m in document.system]
        return encode_document(tools, text, document.form, system)

    def _load(self, tools: TextTools, document: Document) -> Prompt:
        try:
            return self._hashed(document, self._files.read_tokens(document.document_id))
        except RequestError:
            if document.kind == "token_ids":
                raise
            # Its text is there still, and the same tokens come of it.
            return self._hashed(document, tuple(self._encoded(tools, document)))

    def _hashed(self, document: Document, token_ids: tuple[int, ...]) -> Prompt:
        facts = self.facts
        return as_prompt(token_ids, facts.block_size, facts.fingerprint, document.cache_salt)

    def _keep(self, document_id: str, prompt: Prompt) -> None:
        self._kept[document_id] = prompt
        self._kept.move_to_end(document_id)
        total = sum(len(kept.token_ids) for kept in self._kept.values())
        while total > MAX_KEPT_TOKENS and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            total -= len(dropped.token_ids)

    def has_tokens(self, document: Document) -> bool:
        """Whether its tokens need not be made anew."""
        return self.is_current(document) and self._files.has(document.document_id, TOKENS)


def check_size(num_tokens: int, max_tokens: int) -> None:
    """Refuse what can never be held.

    Raises:
        RequestError: naming both numbers.
    """
    if num_tokens == 0:
        raise unprocessable("the document is empty: it has no tokens")
    if num_tokens > max_tokens:
        raise RequestError(
            f"the document has {num_tokens} tokens and this cluster can hold {max_tokens}: "
            f"split it, or serve with more KV memory or a longer context",
            code="document_too_large",
            param="source",
        )
