"""What a document's tokens and block hashes are, kept at hand while it is in use.

Encoding, reading and hashing a document takes up to minutes: a text worker does it, and the latest
few are kept, packed.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from coordinator.jobs.document import Document
from coordinator.jobs.document_files import TOKENS, DocumentFiles
from coordinator.text.packing import unpacked
from coordinator.text.tasks import (
    CompareForms,
    EncodeDocument,
    LoadDocument,
    PackedPrompt,
    Same,
    Workers,
)
from coordinator.tokenizing import Prompt
from protocol.errors import RequestError

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
        workers: make tokens of text.
        facts: of the model.
    """

    def __init__(self, files: DocumentFiles, workers: Workers, facts: ModelFacts) -> None:
        self.facts = facts
        self._files = files
        self._folder = str(files.folder)
        self._workers = workers
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
        return await self._made(document, LoadDocument(self._folder, document))

    async def encode(self, document: Document, max_tokens: int) -> Prompt:
        """Make the tokens of a document from its text, and keep them on the disk.

        Raises:
            RequestError: it has no tokens, too many, or is of another model's.
        """
        if document.kind == "token_ids":
            if document.fingerprint and document.fingerprint != self.facts.fingerprint:
                raise model_changed()
            return await self._made(document, LoadDocument(self._folder, document))
        prompt = await self._made(document, EncodeDocument(self._folder, document, max_tokens))
        packed = prompt.token_ids
        await finished(self._files.write_tokens, document.document_id, packed)
        return prompt

    async def is_same(self, document: Document, form: str) -> bool:
        """Whether a document has the same tokens in that form, too."""
        task = CompareForms(self._folder, document, form)
        found = await self._workers.run(document.tenant, task)
        assert isinstance(found, Same), found
        return found.is_same

    async def _made(self, document: Document, task: LoadDocument | EncodeDocument) -> Prompt:
        found = await self._workers.run(document.tenant, task)
        assert isinstance(found, PackedPrompt), found
        prompt = unpacked(found)
        self.keep(document.document_id, prompt)
        return prompt

    def is_at_hand(self, document: Document) -> bool:
        """Whether nothing is read or made for ``prompt``."""
        return document.document_id in self._kept or not self.has_tokens(document)

    def forget(self, document_id: str) -> None:
        self._kept.pop(document_id, None)

    def keep(self, document_id: str, prompt: Prompt) -> None:
        """Have it at hand, in the place of what was not used for longest."""
        self._kept[document_id] = prompt
        self._kept.move_to_end(document_id)
        total = sum(len(kept.token_ids) for kept in self._kept.values())
        while total > MAX_KEPT_TOKENS and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            total -= len(dropped.token_ids)

    def has_tokens(self, document: Document) -> bool:
        """Whether its tokens need not be made anew."""
        return self.is_current(document) and self._files.has(document.document_id, TOKENS)


async def finished(work: Callable[..., None], *arguments: object) -> None:
    """``work`` in a thread, to its end: no thread stops when its task is cancelled, and it must not
    write a file of a document that is deleted next."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        running.exception()
        raise


def model_changed() -> RequestError:
    """A document of token ids, which mean something else to the model that is served now."""
    return RequestError(
        "these are token ids of another model than is served now: ingest it again",
        code="document_model_changed",
        param="document_id",
        status=409,
    )
