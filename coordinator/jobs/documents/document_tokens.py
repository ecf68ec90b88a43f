"""What a document's tokens and block hashes are, kept at hand while it is in use.

Encoding, reading and hashing a document takes up to minutes: a text worker does it, and the latest
few are kept, packed.
"""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from coordinator.jobs.documents.document import Document
from coordinator.jobs.documents.document_files import file_names, packed_tokens
from coordinator.jobs.documents.identity import MODEL_CHANGED, OF_TOKENS, ModelFacts, mismatch
from coordinator.jobs.files.folder import DurableFolder, finished
from coordinator.text.tasks import Encoded, EncodeDocument, LoadDocument, PackedPrompt, Workers
from coordinator.text.tokenizing import Prompt
from protocol.errors import RequestError

MAX_KEPT_TOKENS = 2 << 20


@dataclass(frozen=True, slots=True)
class Encoding:
    """A document's tokens; what the model's template has shown, and what that varies with."""

    prompt: Prompt
    shown: str
    varies_with: tuple[str, ...] = ()


class DocumentTokens:
    """All documents' tokens.

    Args:
        files: where they lie.
        workers: make tokens of text.
        facts: of the model.
    """

    def __init__(self, files: DurableFolder, workers: Workers, facts: ModelFacts) -> None:
        self.facts = facts
        self._files = files
        self._folder = str(files.path)
        self._workers = workers
        self._kept: OrderedDict[str, Prompt] = OrderedDict()

    def mismatch(self, document: Document) -> str | None:
        """What is served otherwise than when its KV was made: a reason of identity.py."""
        return mismatch(document, self.facts) if document.num_tokens else None

    def has_tokens(self, document: Document) -> bool:
        """Whether its tokens are what would be made of it now, and need not be made."""
        if not document.num_tokens or self.mismatch(document) in OF_TOKENS:
            return False
        return (self._files / file_names(document.id)[2]).exists()

    def is_current(self, document: Document) -> bool:
        """Whether it is prepared: its KV is of use as the model is served now, if it is stored."""
        return self.mismatch(document) is None and self.has_tokens(document)

    async def prompt(self, document: Document) -> Prompt:
        """Tokens of a document that has them, and their hashes as blocks are now.

        Raises:
            RequestError: ``document_damaged``.
        """
        kept = self._kept.get(document.id)
        if kept is not None:
            self._kept.move_to_end(document.id)
            return kept
        found = await self._workers.run(document.tenant, LoadDocument(self._folder, document))
        assert isinstance(found, PackedPrompt), found
        prompt = found.unpacked()
        self.keep(document.id, prompt)
        return prompt

    async def encode(self, document: Document, max_tokens: int) -> Encoding:
        """Make the tokens of a document from its text, and keep them on the disk.

        Raises:
            RequestError: it has no tokens, too many, or is of another model's.
        """
        if document.kind == "token_ids" and mismatch(document, self.facts) == MODEL_CHANGED:
            raise model_changed()
        if document.kind == "token_ids" or self.has_tokens(document):
            return Encoding(await self.prompt(document), document.shown)
        task = EncodeDocument(self._folder, document, max_tokens)
        found = await self._workers.run(document.tenant, task)
        assert isinstance(found, Encoded), found
        prompt = found.prompt.unpacked()
        packed = await asyncio.to_thread(packed_tokens, prompt.token_ids)
        await finished(asyncio.to_thread(self._files.write, file_names(document.id)[2], packed))
        self.keep(document.id, prompt)
        return Encoding(prompt, found.shown, found.varies_with)

    def is_at_hand(self, document: Document) -> bool:
        """Whether nothing is read or made for ``prompt``."""
        return document.id in self._kept or not self.has_tokens(document)

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


def model_changed() -> RequestError:
    """A document of token ids, which mean something else to the model that is served now."""
    return RequestError(
        "these are token ids of another model than is served now: ingest it again",
        code="document_model_changed",
        param="document_id",
        status=409,
    )
