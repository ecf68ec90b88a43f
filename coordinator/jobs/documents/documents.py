"""What a caller may do with documents beside what it may do with any job (engine/engine.py).

``create`` puts the source on the disk, then the document into the database, and only then answers:
what has been acknowledged is not lost.
"""

import asyncio
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from coordinator.jobs.documents import stored
from coordinator.jobs.documents.document import Document, Pin, check_size, describe
from coordinator.jobs.documents.document_files import file_names, packed_tokens
from coordinator.jobs.documents.identity import MISMATCHED, explain
from coordinator.jobs.documents.ingestor import IngestRequest
from coordinator.jobs.documents.parts import DocumentParts
from coordinator.jobs.documents.states import FINAL, DocumentEvent, DocumentState
from coordinator.jobs.engine.disk import check_space
from coordinator.jobs.engine.engine import Engine, conflict
from coordinator.jobs.engine.table import Connection, Idempotency
from coordinator.text.tokenizing import Prompt
from protocol.errors import RequestError

SLIDES_FROM = 0.95  # of a pin's time: not every question is written down
MAX_BYTES_PER_TOKEN = 8  # a longer text is not even tokenized


@dataclass(frozen=True, slots=True)
class Source:
    """What a document is made of: one of text, token ids, or a file that ``is_ours`` to move."""

    text: bytes | memoryview | None = None  # UTF-8
    prompt: Prompt | None = None
    path: Path | None = None
    is_ours: bool = False

    @property
    def size_bytes(self) -> int:
        if self.text is not None:
            return len(self.text)
        if self.path is not None:
            return self.path.stat().st_size
        return 0 if self.prompt is None else 4 * len(self.prompt.token_ids)


class Documents:
    """All documents.

    Args:
        parts: that they work with.
        engine: keeps their jobs.
    """

    def __init__(self, parts: DocumentParts, engine: Engine[Document]) -> None:
        self.parts = parts
        self.engine = engine
        self.table = parts.table
        self.limits = parts.limits
        self.tokens = parts.tokens
        self.tiers = parts.ingestor.tiers
        self.folder = parts.files.path
        self._ingestor = parts.ingestor

    async def create(
        self, document: Document, source: Source, idempotency: Idempotency | None
    ) -> tuple[Document, bool]:
        """Accept a document.

        Args:
            document: as it was asked for.
            source: what it is made of.
            idempotency: the caller's, if it gave a key.

        Returns:
            It, and whether it is new; else an earlier request with the same key has made it.

        Raises:
            RequestError: it cannot be accepted.
        """
        size_bytes = await asyncio.to_thread(lambda: source.size_bytes)
        check_space(self.folder, 3 * size_bytes, min_free_bytes=self.parts.min_free_bytes)
        self._check_size(source, size_bytes)
        document = msgspec.structs.replace(document, num_bytes=size_bytes)
        if source.prompt is not None:
            document = self._with_tokens(document, source.prompt)
        try:
            await asyncio.to_thread(self._write_source, document.id, source)
            kept, is_new = await self.table.insert(
                document,
                lambda connection: self.parts.admission.check_new(connection, document),
                idempotency,
            )
        except RequestError:  # not of a cancelled caller, whose document may be there
            await asyncio.to_thread(self.parts.files.remove, *file_names(document.id))
            raise
        if not is_new:
            await asyncio.to_thread(self.parts.files.remove, *file_names(document.id))
        self.engine.runner.wake()
        return kept, is_new

    def _check_size(self, source: Source, size_bytes: int) -> None:
        if not self._ingestor.is_ready:
            return  # how much can be held is not known yet: it is checked again before the work
        max_tokens = self.parts.max_tokens()
        if source.prompt is not None:
            check_size(len(source.prompt.token_ids), max_tokens)
        elif source.text is not None and size_bytes > MAX_BYTES_PER_TOKEN * max_tokens:
            check_size(size_bytes // MAX_BYTES_PER_TOKEN, max_tokens)

    def _with_tokens(self, document: Document, prompt: Prompt) -> Document:
        self.tokens.keep(document.id, prompt)
        return msgspec.structs.replace(
            document,
            num_tokens=len(prompt.token_ids),
            block_size=self.tokens.facts.block_size,
            kv_dtype=self.tokens.facts.kv_dtype,
            first_hash=prompt.block_hashes[0].hex() if prompt.block_hashes else "",
        )

    def _write_source(self, document_id: str, source: Source) -> None:
        files, (file, text, tokens) = self.parts.files, file_names(document_id)
        if source.prompt is not None:
            files.write(tokens, packed_tokens(source.prompt.token_ids))
        elif source.path is not None:
            (files.adopt if source.is_ours else files.copy)(source.path, file)
        else:
            files.write(text, source.text or b"")

    # -- looking -----------------------------------------------------------------------------------

    async def checked(self, document: Document) -> Document:
        """The document, evicted or damaged if blocks of it are gone."""
        return await stored.check_blocks(self.parts, document)

    async def describe(self, document: Document) -> dict[str, Any]:
        """All about a document, with where its blocks lie."""
        residency: list[dict[str, Any]] = []
        if self.tokens.is_current(document) and document.num_blocks:
            hashes = (await self.tokens.prompt(document)).block_hashes
            residency = [
                {
                    "tier": place.tier,
                    "worker": place.worker,
                    "fraction": round(place.num_blocks / len(hashes), 4),
                }
                for place in self._ingestor.residency(hashes)
            ]
        return {**self.summarise(document), "residency": residency}

    def summarise(self, document: Document) -> dict[str, Any]:
        """What the database knows of a document, and how it stands if it is being made."""
        told = describe(document, self.limits.segment_tokens, self.parts.live.get(document.id))
        reason = self.tokens.mismatch(document)
        if reason is None or document.state is not DocumentState.READY:
            return told
        message = explain(document, reason, self.tokens.facts)
        return {**told, "status": MISMATCHED, "mismatch": {"reason": reason, "message": message}}

    # -- changing ----------------------------------------------------------------------------------

    async def resume(self, tenant: str, document_id: str) -> Document:
        """Go on with a document that has failed or was cancelled, where it had got to.

        Raises:
            RequestError: ``not_resumable``: it has not.
        """
        return await self._queue(tenant, document_id, DocumentEvent.RESUME, "not_resumable")

    async def rewarm(self, tenant: str, document_id: str) -> Document:
        """Bring an evicted document back, and a ready one into a decode pool's memory.

        One that was made otherwise than the model is served now is made anew.

        Raises:
            RequestError: ``not_rewarmable``: it is neither.
        """
        document = await self.table.get(tenant, document_id)
        if document.state is not DocumentState.READY or not self.tokens.is_current(document):
            return await self._queue(tenant, document_id, DocumentEvent.REWARM, "not_rewarmable")
        prompt = await self.tokens.prompt(document)
        await self._ingestor.warm(
            IngestRequest(
                document_id=document_id,
                request_id=f"{document_id}-warm-{secrets.token_hex(4)}",
                token_ids=prompt.token_ids,
                block_hashes=prompt.block_hashes,
                tenant=tenant,
                cache_salt=document.cache_salt,
                ring_size=document.ring_size,
            )
        )
        return document

    async def _queue(
        self, tenant: str, document_id: str, event: DocumentEvent, code: str
    ) -> Document:
        def work(found: Document) -> Document | None:
            if found.is_pending:  # it is on its way already
                return None
            return found.after(event, error=None, num_parse_crashes=0)

        why = f"{event.value} is of no use"
        return await self.engine.retry(tenant, document_id, work, code, why)

    async def update(
        self, tenant: str, document_id: str, pin: Pin | None, metadata: dict[str, Any] | None
    ) -> Document:
        """Give a document another pin, from now on, or other metadata.

        Raises:
            RequestError: ``pin_quota_exceeded``.
        """
        before = await self.table.get(tenant, document_id)
        if pin is not None and before.state in FINAL:
            raise conflict("not_pinnable", before, "there is nothing to pin")

        def work(found: Document) -> Document:
            changes: dict[str, Any] = {} if metadata is None else {"metadata": metadata}
            if pin is not None:
                changes["pin"] = pin if found.is_pending else pin.begin(self.table.clock())
            return msgspec.structs.replace(found, **changes)

        def check(connection: Connection, after: Document) -> None:
            if after.pin.is_set and after.pin.mode != before.pin.mode:
                self.parts.admission.check_pin(connection, after, after.num_tokens)

        document = await self.table.change(document_id, work, also=check)
        if pin is not None and not document.is_pending:
            await stored.tell_pin(self.parts, document)
        return document

    async def touch(self, document: Document) -> None:
        """A question was asked: a sliding pin begins anew, if that makes a difference."""
        pin, now = document.pin, self.table.clock()
        if pin.is_set and pin.is_sliding and pin.expires_at - now < SLIDES_FROM * pin.ttl_s:
            await self.table.change(
                document.id, lambda found: msgspec.structs.replace(found, pin=found.pin.begin(now))
            )
