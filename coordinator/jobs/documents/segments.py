"""Computes a document's KV segment by segment; each is a checkpoint.

Nothing is remembered of how far it got but what is stored: the next attempt, of this process or of
another, on pools of any shape, begins at the longest prefix that the store has then. A segment that
fails ends the attempt, and the next attempt (engine/runner.py) begins with it.
"""

import asyncio
import time
from collections.abc import Callable, Iterator

import msgspec

from coordinator.jobs.documents.document import SOFT, Document, Live, chunks, eta_s
from coordinator.jobs.documents.ingestor import IngestRequest, IngestResult
from coordinator.jobs.documents.parts import DocumentParts
from coordinator.jobs.documents.states import DocumentEvent, DocumentState
from coordinator.jobs.engine.job import Notice
from coordinator.jobs.engine.suspects import Work
from coordinator.jobs.engine.turns import Renew
from coordinator.text.tokenizing import Prompt
from protocol.errors import RequestError
from protocol.process.failpoints import SEGMENT_AFTER, SEGMENT_BEFORE

READING, LOADING = 0, 1  # positions of a document's work, for the gate; its segments follow
MAX_ROUNDS = 3  # a store that cannot hold all of a document loses one end while the other comes


def segment_ends(num_stored: int, num_tokens: int, segment_tokens: int) -> Iterator[int]:
    """Where the segments end that are still to be computed."""
    end = num_stored
    while end < num_tokens:
        end = min(num_tokens, (end // segment_tokens + 1) * segment_tokens)
        yield end


async def compute_segments(
    parts: DocumentParts, document: Document, renew: Renew, on_segment: Callable[[], None]
) -> None:
    """Bring a document from PREFILLING to READY.

    Args:
        parts: of the documents.
        document: with its tokens.
        renew: offers the turn to others, before each segment.
        on_segment: called behind each.

    Raises:
        RequestError: as ``Ingestor.compute``, or when the store cannot hold the document.
        IllegalTransition: it was ended meanwhile.
    """
    async with parts.gate.work(Work(Document.KIND, document.id, LOADING)):
        prompt = await parts.tokens.prompt(document)
    attempt = _Attempt(parts, document, prompt)
    try:
        for _ in range(MAX_ROUNDS):
            await attempt.compute_missing(renew, on_segment)
            await parts.table.change(document.id, lambda d: d.after(DocumentEvent.COMPUTED))
            num_stored = parts.ingestor.num_stored_blocks(prompt.block_hashes)
            if num_stored >= len(prompt.block_hashes):
                await _finish(parts, document.id, prompt)
                return
            await parts.table.change(document.id, lambda d: d.after(DocumentEvent.LOSE_BLOCKS))
    finally:
        parts.live.pop(document.id, None)
    raise RequestError(
        f"the store loses blocks of this document as fast as they come: it holds {num_stored} "
        f"of its {len(prompt.block_hashes)}; make it larger, or unpin others",
        code="kv_capacity_exceeded",
        status=507,
    )


async def _finish(parts: DocumentParts, document_id: str, prompt: Prompt) -> None:
    now = parts.table.clock()
    document = await parts.table.change(
        document_id,
        lambda found: found.after(
            DocumentEvent.STORED, pin=found.pin.begin(now), num_done=found.num_tokens, error=None
        ),
    )
    if document.pin.is_set:
        parts.ingestor.pin(document_id, prompt.block_hashes, document.pin.mode)
    else:
        parts.ingestor.unpin(document_id)


class _Attempt:
    """One attempt at one document."""

    def __init__(self, parts: DocumentParts, document: Document, prompt: Prompt) -> None:
        self._parts = parts
        self._document = document
        self._prompt = prompt
        self._began = time.monotonic()
        self._num_begun_with: int | None = None
        self._num_computed = 0  # by this attempt
        self._serial = 0

    async def compute_missing(self, renew: Renew, on_segment: Callable[[], None]) -> None:
        """Compute every segment from the longest stored prefix on."""
        parts, hashes, total = self._parts, self._prompt.block_hashes, len(self._prompt.token_ids)
        num_stored = parts.ingestor.num_stored_blocks(hashes)
        resumed = num_stored * parts.block_size
        if num_stored >= len(hashes) > 0:
            resumed = total  # what is behind the last full block is never kept
        if self._num_begun_with is None:
            self._num_begun_with = resumed
            self._document = await parts.table.change(
                self._document.id,
                lambda found: msgspec.structs.replace(
                    found, num_resumed_tokens=resumed, num_done=resumed, num_cached=resumed
                ),
            )
        self._show(resumed)
        for end in segment_ends(resumed, total, parts.segment_tokens):
            await renew()
            # By number, not by tokens: part of a segment may be stored when it is begun again.
            number = -(-end // parts.segment_tokens)
            async with parts.gate.work(Work(Document.KIND, self._document.id, LOADING + number)):
                await parts.crash_points.pass_by(SEGMENT_BEFORE)
                result = await self._segment(end)
                await parts.crash_points.pass_by(SEGMENT_AFTER)
                await self._written(end, result)
            on_segment()

    async def _segment(self, end: int) -> IngestResult:
        parts, document = self._parts, self._document
        self._serial += 1
        request = IngestRequest(
            document_id=document.id,
            request_id=f"{document.id}-{document.attempt}-{self._serial}",
            token_ids=self._prompt.token_ids.head(end),
            block_hashes=self._prompt.block_hashes[: end // parts.block_size],
            tenant=document.tenant,
            cache_salt=document.cache_salt,
            ring_size=document.ring_size,
        )
        # What is being made is not evicted for something else that is.
        mode = document.pin.mode if document.pin.is_set else SOFT
        parts.ingestor.pin(document.id, request.block_hashes, mode)
        task = asyncio.create_task(parts.ingestor.compute(request, self._show))
        try:
            shown = self._live.num_done
            while not (await asyncio.wait({task}, timeout=parts.limits.progress_interval_s))[0]:
                if self._live.num_done != shown:
                    shown = self._live.num_done
                    progress = self._progress(document.used_ring_size)
                    await parts.table.change(document.id, lambda found: found, progress)
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    async def _written(self, end: int, result: IngestResult) -> None:
        self._num_computed += result.num_computed_tokens
        self._show(end)

        def work(found: Document) -> Document:
            if found.state is not DocumentState.PREFILLING:
                return found.after(DocumentEvent.COMPUTED)  # raises: it was ended meanwhile
            return msgspec.structs.replace(
                found,
                num_done=end,
                num_computed=found.num_computed + result.num_computed_tokens,
                num_cached=max(0, end - self._num_computed),
                used_ring_size=result.ring_size,
                compute_s=found.compute_s + result.compute_s,
            )

        progress = self._progress(result.ring_size)
        self._document = await self._parts.table.change(self._document.id, work, progress)

    @property
    def _live(self) -> Live:
        return self._parts.live[self._document.id]

    def _show(self, num_done: int) -> None:
        elapsed = time.monotonic() - self._began
        num_new = num_done - (self._num_begun_with or 0)
        rate = max(num_new, 0) / elapsed if elapsed > 0 else 0.0
        self._parts.live[self._document.id] = Live(num_done, rate)

    def _progress(self, ring_size: int) -> Notice:
        live, total = self._live, len(self._prompt.token_ids)
        tokens = {
            "total": total,
            "done": live.num_done,
            "cached": max(0, live.num_done - self._num_computed),
        }
        return Notice(
            "progress",
            {
                "tokens": tokens,
                "chunks": chunks(total, live.num_done, self._parts.segment_tokens),
                "rate_tok_s": round(live.tokens_per_s, 1),
                "eta_s": eta_s(total, live.num_done, live.tokens_per_s),
                "ring_size": ring_size or None,
            },
        )
