"""What a caller may do with documents; every method is for one tenant.

1. ``create`` puts the source on the disk, then the document into the database, and only then
   answers: what has been acknowledged is not lost.
2. The runner makes it ready; the maintenance watches over pins, deadlines and evicted blocks.
3. ``delete`` takes it out of the database at once, and its KV and files afterwards.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from coordinator.config import JobLimits
from coordinator.errors import shutting_down
from coordinator.jobs.documents.document import (
    HARD,
    Change,
    Document,
    Pin,
    describe,
    stepped,
)
from coordinator.jobs.documents.document_tokens import DocumentTokens
from coordinator.jobs.documents.events import WrittenEvent
from coordinator.jobs.documents.files import TEXT, DocumentFiles
from coordinator.jobs.documents.identity import MISMATCHED, explain
from coordinator.jobs.documents.ingestor import Ingestor, IngestRequest
from coordinator.jobs.documents.maintenance import Maintenance
from coordinator.jobs.documents.pins import Pinned, PinPolicy
from coordinator.jobs.documents.rows import not_found
from coordinator.jobs.documents.runner import Runner
from coordinator.jobs.documents.sizes import check_size
from coordinator.jobs.documents.states import FINAL, PENDING, DocumentEvent, DocumentState
from coordinator.jobs.documents.table import DocumentTable, Idempotency
from coordinator.jobs.documents.watchers import Watchers
from coordinator.jobs.gate import Gate
from coordinator.jobs.space import check_space
from coordinator.jobs.suspects import DOCUMENT, Name
from coordinator.text.tokenizing import Prompt
from protocol.errors import IllegalTransition, RequestError

SLIDES_FROM = 0.95  # of a pin's time: not every question is written down
MAX_BYTES_PER_TOKEN = 8  # a longer text is not even tokenized
BYTES_PER_TOKEN = 4  # of a text, about; until its tokens are known


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


@dataclass(frozen=True, slots=True)
class Parts:
    """What ``Documents`` is put together from."""

    table: DocumentTable
    files: DocumentFiles
    tokens: DocumentTokens
    ingestor: Ingestor
    policy: PinPolicy
    runner: Runner
    maintenance: Maintenance
    gate: Gate
    limits: JobLimits
    max_tokens: Callable[[], int]  # of a document that can be asked about
    min_free_bytes: int


class Documents:
    """All documents.

    Args:
        parts: see there.
    """

    def __init__(self, parts: Parts) -> None:
        self.limits = parts.limits
        self.tiers = parts.ingestor.tiers
        self.tokens = parts.tokens
        self.runner = parts.runner
        self.maintenance = parts.maintenance
        self.watchers = Watchers(parts.limits)
        self.table = parts.table
        self.folder = parts.files.folder
        self.gate = parts.gate
        self._files = parts.files
        self._ingestor = parts.ingestor
        self.policy = parts.policy
        self._max_tokens = parts.max_tokens
        self.min_free_bytes = parts.min_free_bytes
        self.folder = parts.files.folder

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
        await self.maintenance.wait_recovered()
        size_bytes = await asyncio.to_thread(lambda: source.size_bytes)
        check_space(self._files.folder, 3 * size_bytes, min_free_bytes=self.min_free_bytes)
        self._check_size(source, size_bytes)
        if source.prompt is not None:
            document = self._with_tokens(document, source.prompt)
        num_tokens = document.num_tokens or size_bytes // BYTES_PER_TOKEN
        try:
            await asyncio.to_thread(self._write_source, document.document_id, source)
            kept, is_new = await self.table.insert(
                document,
                idempotency,
                lambda pinned: self.policy.check(document.pin, num_tokens, pinned),
                size_bytes,
            )
        except RequestError:
            await asyncio.to_thread(self._files.remove, document.document_id)
            raise
        if not is_new:
            await asyncio.to_thread(self._files.remove, document.document_id)
        self.runner.wake()
        return kept, is_new

    def _check_size(self, source: Source, size_bytes: int) -> None:
        if not self._ingestor.is_ready:
            return  # how much can be held is not known yet: it is checked again before the work
        max_tokens = self._max_tokens()
        if source.prompt is not None:
            check_size(len(source.prompt.token_ids), max_tokens)
        elif source.text is not None and size_bytes > MAX_BYTES_PER_TOKEN * max_tokens:
            check_size(size_bytes // MAX_BYTES_PER_TOKEN, max_tokens)

    def _with_tokens(self, document: Document, prompt: Prompt) -> Document:
        self.tokens.keep(document.document_id, prompt)
        return msgspec.structs.replace(
            document,
            num_tokens=len(prompt.token_ids),
            block_size=self.tokens.facts.block_size,
            kv_dtype=self.tokens.facts.kv_dtype,
            first_hash=prompt.block_hashes[0].hex() if prompt.block_hashes else "",
        )

    def _write_source(self, document_id: str, source: Source) -> None:
        if source.prompt is not None:
            self._files.write_tokens(document_id, source.prompt.token_ids)
        elif source.path is None:
            self._files.write(document_id, TEXT, source.text or b"")
        elif source.is_ours:
            self._files.adopt(document_id, source.path)
        else:
            self._files.copy(document_id, source.path)

    # -- looking -----------------------------------------------------------------------------------

    async def get(self, tenant: str, document_id: str) -> Document:
        """One document.

        Raises:
            RequestError: 404: unknown, malformed, or another tenant's.
        """
        document = await self.table.find(document_id)
        if document is None or document.tenant != tenant:
            raise not_found()
        return document

    async def wait(self, tenant: str, document_id: str, seconds: float) -> Document:
        """The document when nothing is to be done for it any more, or after a time."""
        deadline = time.monotonic() + min(seconds, self.limits.max_wait_s)
        while True:
            if self.table.changes.is_closed:
                raise shutting_down()
            news = self.table.changes.ticket(document_id)
            document = await self.get(tenant, document_id)
            left_s = deadline - time.monotonic()
            if document.state not in PENDING or left_s <= 0:
                return document
            try:
                async with asyncio.timeout(left_s):
                    await news.wait()
            except TimeoutError:
                continue

    async def page(
        self, tenant: str, after: str | None, limit: int, *, is_ascending: bool
    ) -> tuple[list[Document], bool]:
        """Some of the tenant's documents, and whether there are more."""
        return await self.table.page(tenant, after, limit, is_ascending=is_ascending)

    async def describe(self, document: Document) -> dict[str, Any]:
        """All about a document, with where its blocks lie."""
        residency: list[dict[str, Any]] = []
        if self.tokens.is_current(document) and document.num_blocks:
            prompt = await self.tokens.prompt(document)
            residency = [
                {
                    "tier": place.tier,
                    "worker": place.worker,
                    "fraction": round(place.num_blocks / len(prompt.block_hashes), 4),
                }
                for place in self._ingestor.residency(prompt.block_hashes)
            ]
        return {**self.summarise(document), "residency": residency}

    def summarise(self, document: Document) -> dict[str, Any]:
        """What the database knows of a document, and how it stands if it is being made."""
        live = self.runner.live(document.document_id)
        told = describe(document, self.limits.segment_tokens, live)
        reason = self.tokens.mismatch(document)
        if reason is None or document.state is not DocumentState.READY:
            return told
        message = explain(document, reason, self.tokens.facts)
        return {**told, "status": MISMATCHED, "mismatch": {"reason": reason, "message": message}}

    async def events(
        self, document_id: str, starting_after: int
    ) -> tuple[list[WrittenEvent], bool]:
        """Events after a number, and whether there may be more; waits for nothing."""
        document = await self.table.find(document_id)
        events = await self.table.events(document_id, starting_after)
        return events, document is not None and document.state in PENDING

    # -- changing ----------------------------------------------------------------------------------

    async def cancel(self, tenant: str, document_id: str) -> tuple[Document, bool]:
        """End a document's making; and whether it was running until now.

        Raises:
            RequestError: ``not_cancellable``: it has ended otherwise.
        """
        document = await self.get(tenant, document_id)
        try:
            document = await self.table.change(
                document_id, lambda found: stepped(found, DocumentEvent.CANCEL)
            )
        except IllegalTransition as error:
            document = await self.get(tenant, document_id)
            if document.status == "cancelled":
                return document, False
            raise _conflict(
                "not_cancellable", document, "only a running one is cancelled"
            ) from error
        await self._let_go(document_id)
        return document, True

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
        document = await self.get(tenant, document_id)
        if document.state is not DocumentState.READY or not self.tokens.is_current(document):
            return await self._queue(tenant, document_id, DocumentEvent.REWARM, "not_rewarmable")
        prompt = await self.tokens.prompt(document)
        await self._ingestor.warm(
            IngestRequest(
                document_id,
                f"{document_id}-warm-{secrets.token_hex(4)}",
                prompt.token_ids,
                prompt.block_hashes,
                tenant,
                document.cache_salt,
                document.ring_size,
            )
        )
        return document

    async def _queue(
        self, tenant: str, document_id: str, event: DocumentEvent, code: str
    ) -> Document:
        await self.get(tenant, document_id)
        await self.gate.retry(Name(DOCUMENT, document_id))

        def work(found: Document) -> Change:
            if found.state in PENDING:  # it is on its way already
                return Change(found)
            return stepped(found, event, error=None, num_parse_crashes=0)

        try:
            document = await self.table.change(document_id, work)
        except IllegalTransition as error:
            document = await self.get(tenant, document_id)
            raise _conflict(code, document, f"{event.value} is of no use") from error
        self.runner.wake()
        return document

    async def update(
        self, tenant: str, document_id: str, pin: Pin | None, metadata: dict[str, Any] | None
    ) -> Document:
        """Another pin, from now on, or other metadata.

        Raises:
            RequestError: ``pin_quota_exceeded``.
        """
        before = await self.get(tenant, document_id)
        if pin is not None and before.state in FINAL:
            raise _conflict("not_pinnable", before, "there is nothing to pin")

        def work(found: Document) -> Change:
            changes: dict[str, Any] = {} if metadata is None else {"metadata": metadata}
            if pin is not None:
                is_begun = found.state not in PENDING
                changes["pin"] = pin.begin(self.table.clock()) if is_begun else pin
            return Change(msgspec.structs.replace(found, **changes))

        def check(following: Document, pinned: Pinned) -> None:
            is_more = following.pin.is_set and following.pin.mode != before.pin.mode
            if is_more or (following.pin.mode == HARD and before.pin.mode != HARD):
                self.policy.check(following.pin, following.num_tokens, pinned)

        document = await self.table.change(document_id, work, check)
        if pin is not None and document.state not in PENDING:
            await self.maintenance.tell_pin(document)
        return document

    async def touch(self, document: Document) -> None:
        """A question was asked: a sliding pin begins anew, if that makes a difference."""
        pin, now = document.pin, self.table.clock()
        if pin.is_set and pin.is_sliding and pin.expires_at - now < SLIDES_FROM * pin.ttl_s:
            await self.table.change(
                document.document_id,
                lambda found: Change(msgspec.structs.replace(found, pin=found.pin.begin(now))),
            )

    async def delete(self, tenant: str, document_id: str) -> None:
        """Forget a document, and end its making. Its KV goes unless another one shares it."""
        await self.get(tenant, document_id)
        await self.table.delete(document_id)
        await self._let_go(document_id)
        self.maintenance.wake()

    async def _let_go(self, document_id: str) -> None:
        await self.runner.abort(document_id)
        self._ingestor.unpin(document_id)


def _conflict(code: str, document: Document, why: str) -> RequestError:
    return RequestError(f"the document is {document.status}: {why}", code=code, status=409)
