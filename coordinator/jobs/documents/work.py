"""Documents as a kind of work: from a source to KV that is kept, and what is kept of it.

1. A source is parsed (in another process) and encoded while other documents are computed.
2. Its KV is computed segment by segment from the longest stored prefix on; each segment that
   returns is durable, and is written down.
3. When every block is seen to be stored the document is ready, and its pin begins.
4. A pin whose time is over is taken off, with an event. Ready documents are looked at in turns: one
   that has lost blocks is evicted, or damaged if the disk has lost them.

Tenants take turns (engine/turns.py), at reading and at every segment; of one tenant's documents the
order is by priority, then age. An attempt is counted before the work begins.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection

import msgspec

from coordinator.errors import internal_error
from coordinator.jobs.documents.document import Document, Pin
from coordinator.jobs.documents.document_files import file_names
from coordinator.jobs.documents.ingestor import TRY_AGAIN
from coordinator.jobs.documents.parts import DocumentParts
from coordinator.jobs.documents.preparing import prepare
from coordinator.jobs.documents.segments import READING, compute_segments
from coordinator.jobs.documents.states import USABLE, DocumentEvent, DocumentState
from coordinator.jobs.documents.stored import check_blocks, forget_blocks, tell_pin
from coordinator.jobs.engine.engine import contained
from coordinator.jobs.engine.job import Failure, JobEvent, Kind, Notice, WorkLimits
from coordinator.jobs.engine.suspects import Work
from coordinator.jobs.engine.turns import FairSlots
from protocol.errors import RequestError

MAX_TENANTS = 4  # whose documents are worked on at one time
NUM_LOOKED_AT = 8  # ready documents at each tick


class DocumentWork(Kind[Document]):
    """See the module's docstring.

    Args:
        parts: of the documents.
        max_running: documents that are computed at one time.
    """

    def __init__(self, parts: DocumentParts, max_running: int) -> None:
        limits = parts.limits
        # The next ones are read while others are computed.
        most_read = max(1, limits.max_reading - 1)
        self.limits = WorkLimits(
            max_of_tenant=max_running + most_read,
            max_tenants=MAX_TENANTS,
            retry_s=limits.retry_s,
            max_retry_s=limits.max_retry_s,
        )
        self._parts = parts
        self._reading = FairSlots(limits.max_reading, most_read)
        self._computing = FairSlots(max_running, max_running)
        self._last_seen = ""

    @property
    def is_ready(self) -> bool:
        return self._parts.ingestor.is_ready

    async def work(self, document: Document, on_progress: Callable[[], None]) -> None:
        parts, tenant = self._parts, document.tenant
        order = (-document.priority, document.created_at)
        if parts.tokens.is_current(document):
            document = await self._prepare(document)
        else:
            work = Work(Document.KIND, document.id, READING)
            async with self._reading.turn(tenant, order), parts.gate.work(work):
                document = await self._prepare(document)
        async with self._computing.turn(tenant, order) as renew:
            document = await parts.table.change(
                document.id,
                lambda found: found.after(DocumentEvent.TOKENIZED),
                also=parts.admission.check_tokens,
            )
            await compute_segments(parts, document, renew, on_progress)

    async def _prepare(self, document: Document) -> Document:
        document = await self._parts.table.change(
            document.id,
            lambda d: d.after(DocumentEvent.START, attempt=d.attempt + 1, error=None),
        )
        return await prepare(self._parts, document)

    def failure_of(self, error: Exception) -> Failure | None:
        if not isinstance(error, RequestError):
            return Failure.of(internal_error())
        is_passing = error.code in TRY_AGAIN or error.code == "insufficient_storage"
        return None if is_passing else Failure.of(error)

    def let_go(self, job_id: str) -> None:
        self._parts.ingestor.unpin(job_id)

    async def when_due(self, document: Document, now: float) -> Document:
        table = self._parts.table
        if document.deadline is not None and document.deadline <= now and document.is_pending:
            return await table.change(document.id, lambda found: found.after(JobEvent.EXPIRE))
        pin = Pin(tier=document.pin.tier, has_expired=True)

        def work(found: Document) -> Document | None:
            is_over = 0 < found.pin.expires_at <= now  # else it was extended meanwhile
            return msgspec.structs.replace(found, pin=pin) if is_over else None

        told = Notice("expired", {"pin": pin.describe()})
        document = await table.change(document.id, work, told)
        if not document.pin.is_set:
            self.let_go(document.id)
        return document

    async def clean_up(self, document: Document) -> None:
        await forget_blocks(self._parts, document)
        await asyncio.to_thread(self._parts.files.remove, *file_names(document.id))
        self._parts.tokens.forget(document.id)

    async def recover(self, known: Collection[str]) -> None:
        await asyncio.to_thread(self._parts.files.sweep, known)
        # What is pinned is kept from the beginning.
        for document in await self._parts.table.select("pin_mode != 'none'"):
            if document.state in USABLE:
                await self._load(document, tell_pin)

    async def look_after(self) -> None:
        if not self._parts.ingestor.is_ready:
            return  # nobody knows what is stored
        ready = await self._parts.table.in_states(
            [DocumentState.READY], after=self._last_seen, limit=NUM_LOOKED_AT
        )
        self._last_seen = ready[-1].id if len(ready) == NUM_LOOKED_AT else ""
        for document in ready:
            await self._load(document, check_blocks)

    async def _load(
        self, document: Document, look: Callable[[DocumentParts, Document], Awaitable[object]]
    ) -> None:
        """Tokens that are not at hand are read, or made again: what dies of it is set aside."""
        with contained(document.id):
            if self._parts.tokens.is_at_hand(document):
                await look(self._parts, document)
                return
            async with self._parts.gate.work(Work(Document.KIND, document.id, READING)):
                await look(self._parts, document)
