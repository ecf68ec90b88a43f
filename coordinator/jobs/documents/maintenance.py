"""Watches over documents that are not being made: once a second, and when there is a deletion.

1. A pin whose time is over is taken off, with an event; a document whose deadline is over, ended.
2. Ready documents are looked at in turns: one that has lost blocks is evicted, or damaged if the
   disk has lost them, and says so.
3. Of deleted documents the KV is forgotten that no other document shares, then the files go.

A bug that one document brings out keeps none of the others from being looked after.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import msgspec

from coordinator.jobs.documents.document import Change, Document, DocumentNotice, Pin, stepped
from coordinator.jobs.documents.document_tokens import DocumentTokens
from coordinator.jobs.documents.files import DocumentFiles
from coordinator.jobs.documents.identity import DTYPE_CHANGED
from coordinator.jobs.documents.ingestor import Ingestor
from coordinator.jobs.documents.runner import Runner
from coordinator.jobs.documents.segments import READING
from coordinator.jobs.documents.states import PENDING, USABLE, DocumentEvent, DocumentState
from coordinator.jobs.documents.table import DocumentTable
from coordinator.jobs.gate import Gate
from coordinator.jobs.suspects import DOCUMENT, Work
from protocol.errors import IllegalTransition, RequestError

TICK_S = 1.0
RECOVERY_S = 5.0  # that a caller waits for it
INSUFFICIENT_STORAGE = "insufficient_storage"
NUM_LOOKED_AT = 8  # ready documents at each tick

_log = logging.getLogger(__name__)


class Maintenance:
    """See the module's docstring.

    Args:
        table: of the documents.
        files: of the documents.
        tokens: has their hashes.
        ingestor: has their blocks.
        runner: is told of a document that has expired.
        gate: that reading a document's tokens again goes through.
    """

    def __init__(
        self,
        table: DocumentTable,
        files: DocumentFiles,
        tokens: DocumentTokens,
        ingestor: Ingestor,
        runner: Runner,
        gate: Gate,
    ) -> None:
        self._table = table
        self._files = files
        self._tokens = tokens
        self._ingestor = ingestor
        self._runner = runner
        self._gate = gate
        self.recovered = asyncio.Event()
        self._last_seen = ""
        self._wakeup = asyncio.Event()

    def wake(self) -> None:
        """There is something to put away."""
        self._wakeup.set()

    async def recover(self) -> None:
        """After a start: strangers' files are given up."""
        known = await self._table.ids()
        await asyncio.to_thread(self._files.sweep, known)
        self.recovered.set()

    async def wait_recovered(self) -> None:
        """Nothing may be taken in before: its files would be taken for strangers'.

        Raises:
            RequestError: ``starting``, when it takes too long, or what keeps it from it.
        """
        if not self.recovered.is_set() and self._table.refusal.status == 507:
            raise self._table.refusal
        try:
            async with asyncio.timeout(RECOVERY_S):
                await self.recovered.wait()
        except TimeoutError as error:
            raise self._table.refusal from error

    async def tell_pins(self) -> None:
        """After a start: what is pinned is kept from the beginning."""
        for document in await self._table.pinned_documents():
            if document.state in USABLE:
                await self._load(document, self.tell_pin)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._wakeup.clear()
            try:
                await self.tick()
            except RequestError as error:  # a full disk: at the next tick there may be room
                _log.warning("documents are not looked after: %s", error)
            try:
                async with asyncio.timeout(TICK_S):
                    await self._wakeup.wait()
            except TimeoutError:
                continue

    async def tick(self) -> None:
        """Everything that is due."""
        await self._expire()
        await self._put_away()
        if self._ingestor.is_ready:  # else nobody knows what is stored
            await self._look()

    async def tell_pin(self, document: Document) -> None:
        """The ingestor keeps what the document's pin says, from now on."""
        if not document.pin.is_set or not self._tokens.is_current(document):
            self._ingestor.unpin(document.document_id)
            return
        prompt = await self._tokens.prompt(document)
        self._ingestor.pin(document.document_id, prompt.block_hashes, document.pin.mode)

    async def _expire(self) -> None:
        now = self._table.clock()
        for document in await self._table.due(now):
            with _contained(document):
                await self._expire_one(document, now)

    async def _expire_one(self, document: Document, now: float) -> None:
        document_id = document.document_id
        if 0 < document.pin.expires_at <= now:
            await self._change(document_id, lambda found: _without_pin(found, now))
            self._ingestor.unpin(document_id)
        is_pending = document.state in PENDING
        if is_pending and document.deadline is not None and document.deadline <= now:
            await self._change(document_id, lambda found: stepped(found, DocumentEvent.EXPIRE))
            await self._runner.abort(document_id)
            self._ingestor.unpin(document_id)

    async def _look(self) -> None:
        ready = await self._table.with_states(
            frozenset({DocumentState.READY}), limit=NUM_LOOKED_AT, after=self._last_seen or " "
        )
        self._last_seen = ready[-1].document_id if len(ready) == NUM_LOOKED_AT else ""
        for document in ready:
            await self._load(document, self.check_blocks)

    async def _load(
        self, document: Document, work: Callable[[Document], Awaitable[object]]
    ) -> None:
        """Tokens that are not at hand are read, or made again: what dies of it is set aside."""
        with _contained(document):
            if self._tokens.is_at_hand(document):
                await work(document)
                return
            async with self._gate.work(Work(DOCUMENT, document.document_id, READING)):
                await work(document)

    async def check_blocks(self, document: Document) -> Document:
        """The document, evicted or damaged if blocks of it are gone.

        What was made otherwise than the model is served now is left as it is: its blocks cannot be
        seen, and may be there when it is served as before.
        """
        if document.state is not DocumentState.READY or not self._ingestor.is_ready:
            return document
        reason = self._tokens.mismatch(document)
        if reason not in (None, DTYPE_CHANGED):
            return document
        prompt = await self._tokens.prompt(document)
        num_stored = self._ingestor.num_stored_blocks(prompt.block_hashes)
        if num_stored >= len(prompt.block_hashes):
            return document if reason is None else await self._adopt(document)
        if reason is not None:
            return document
        missed = (len(prompt.block_hashes) - num_stored) * self._tokens.facts.block_size
        if self._ingestor.has_damaged(prompt.block_hashes[num_stored:]):
            _log.error("%s: %d tokens are damaged on the disk", document.document_id, missed)
            return await self._evict(document, "damaged", missed_tokens=missed)
        _log.info("%s: %d tokens were evicted", document.document_id, missed)
        reason = "expired" if document.pin.has_expired else "evicted"
        return await self._evict(document, reason, missed_tokens=missed)

    async def _adopt(self, document: Document) -> Document:
        """All of it is stored in the dtype that is served, too: it was made in that one before."""
        dtype = self._tokens.facts.kv_dtype

        def work(found: Document) -> Change:
            return Change(msgspec.structs.replace(found, kv_dtype=dtype))

        return await self._change(document.document_id, work) or document

    async def _evict(self, document: Document, reason: str, **more: int) -> Document:
        warning = DocumentNotice("warning", {"code": reason, "message": "its KV has gone", **more})

        def work(found: Document) -> Change:
            change = stepped(
                found, DocumentEvent.DAMAGE if reason == "damaged" else DocumentEvent.EVICT
            )
            return Change(change.document, (warning, *change.events))

        return await self._change(document.document_id, work) or document

    async def _put_away(self) -> None:
        for document in await self._table.deletions():
            with _contained(document):
                await self._put_away_one(document)

    async def _put_away_one(self, document: Document) -> None:
        await self._runner.abort(document.document_id)
        self._ingestor.unpin(document.document_id)
        await self._forget_blocks(document)
        await asyncio.to_thread(self._files.remove, document.document_id)
        self._tokens.forget(document.document_id)
        await self._table.finish_deletion(document.document_id)

    async def _forget_blocks(self, document: Document) -> None:
        """Chained hashes: what it shares with another document is a common beginning."""
        if not document.first_hash or not self._tokens.has_tokens(document):
            return
        try:
            hashes = (await self._tokens.prompt(document)).block_hashes
        except RequestError as error:  # without its tokens nobody can name its blocks
            _log.warning("%s: %s", document.document_id, error)
            return
        num_shared = 0
        for other in await self._table.sharing(document.first_hash):
            if self._tokens.has_tokens(other):
                theirs = (await self._tokens.prompt(other)).block_hashes
                num_shared = max(num_shared, _num_common(hashes, theirs))
        await self._ingestor.forget(hashes[num_shared:])

    async def _change(
        self, document_id: str, work: Callable[[Document], Change]
    ) -> Document | None:
        try:
            return await self._table.change(document_id, work)
        except (IllegalTransition, RequestError) as error:  # it was faster, or is deleted
            _log.info("%s: %s", document_id, error)
            return None


@contextmanager
def _contained(document: Document) -> Iterator[None]:
    try:
        yield
    except RequestError as error:
        if error.code == INSUFFICIENT_STORAGE:
            raise  # nothing can be done for any of them now
        _log.warning("%s: %s", document.document_id, error)
    except Exception:  # noqa: BLE001 - the outermost frame of a document: the others go on
        _log.exception("%s failed by a bug", document.document_id)


def _without_pin(document: Document, now: float) -> Change:
    if not 0 < document.pin.expires_at <= now:  # it was extended meanwhile
        return Change(document)
    pin = Pin(tier=document.pin.tier, has_expired=True)
    event = DocumentNotice("expired", {"pin": document.pin.describe()})
    return Change(msgspec.structs.replace(document, pin=pin), (event,))


def _num_common(hashes: tuple[bytes, ...], others: tuple[bytes, ...]) -> int:
    for number, (own, other) in enumerate(zip(hashes, others, strict=False)):
        if own != other:
            return number
    return min(len(hashes), len(others))
