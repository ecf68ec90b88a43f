"""Computes a document's KV segment by segment; each is a checkpoint.

Nothing is remembered of how far it got but what is stored: the next attempt, of this process or of
another, on pools of any shape, begins at the longest prefix that the store has then.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from coordinator.config import JobLimits
from coordinator.jobs.documents.document import (
    SOFT,
    Change,
    Document,
    DocumentNotice,
    Live,
    chunks,
    eta_s,
    stepped,
)
from coordinator.jobs.documents.document_tokens import DocumentTokens
from coordinator.jobs.documents.ingestor import Ingestor, IngestRequest, IngestResult
from coordinator.jobs.documents.states import DocumentEvent, DocumentState
from coordinator.jobs.documents.table import DocumentTable
from coordinator.jobs.gate import Gate
from coordinator.jobs.suspects import DOCUMENT, Work
from coordinator.jobs.turns import Turn
from coordinator.text.tokenizing import Prompt
from protocol.crash_points import CrashPoints
from protocol.errors import RequestError
from protocol.failpoints import SEGMENT_AFTER, SEGMENT_BEFORE

READING, LOADING = 0, 1  # positions of a document's work, for the gate; its segments follow
MAX_ROUNDS = 3  # a store that cannot hold all of a document loses one end while the other comes


def segment_ends(num_stored: int, num_tokens: int, segment_tokens: int) -> Iterator[int]:
    """Where the segments end that are still to be computed."""
    end = num_stored
    while end < num_tokens:
        end = min(num_tokens, (end // segment_tokens + 1) * segment_tokens)
        yield end


class Segments:
    """Computes documents. ``live`` says how those that are being computed stand.

    Args:
        table: of the documents.
        ingestor: does the work.
        limits: the size of a segment.
        tokens: has the tokens.
        crash_points: told of what becomes durable.
        gate: that each segment goes through.
    """

    def __init__(
        self,
        table: DocumentTable,
        ingestor: Ingestor,
        limits: JobLimits,
        tokens: DocumentTokens,
        crash_points: CrashPoints,
        gate: Gate,
    ) -> None:
        self.crash_points = crash_points
        self.gate = gate
        self.live: dict[str, Live] = {}
        self.table = table
        self.ingestor = ingestor
        self.limits = limits
        self.tokens = tokens
        block_size = tokens.facts.block_size
        self.segment_tokens = max(1, limits.segment_tokens // block_size) * block_size

    async def compute(
        self, document: Document, turn: Turn, on_segment: Callable[[], object]
    ) -> None:
        """From PREFILLING to READY.

        Args:
            document: with its tokens.
            turn: offered to others before each segment.
            on_segment: called behind each.

        Raises:
            RequestError: as ``Ingestor.compute``, or when the store cannot hold the document.
            IllegalTransition: it was ended meanwhile.
        """
        async with self.gate.work(Work(DOCUMENT, document.document_id, LOADING)):
            prompt = await self.tokens.prompt(document)
        run = _Run(self, document, prompt, turn, on_segment)
        for _ in range(MAX_ROUNDS):
            await run.compute_missing()
            await self.table.change(
                document.document_id, lambda found: stepped(found, DocumentEvent.COMPUTED)
            )
            num_stored = self.ingestor.num_stored_blocks(prompt.block_hashes)
            if num_stored >= len(prompt.block_hashes):
                await self._finish(document.document_id, prompt)
                return
            await self.table.change(
                document.document_id, lambda found: stepped(found, DocumentEvent.LOSE_BLOCKS)
            )
        raise RequestError(
            f"the store loses blocks of this document as fast as they come: it holds {num_stored} "
            f"of its {len(prompt.block_hashes)}; make it larger, or unpin others",
            code="kv_capacity_exceeded",
            status=507,
        )

    async def _finish(self, document_id: str, prompt: Prompt) -> None:
        def work(found: Document) -> Change:
            now = self.table.clock()
            pin = found.pin.begin(now)
            return stepped(
                found,
                DocumentEvent.STORED,
                pin=pin,
                ready_at=now,
                num_done=found.num_tokens,
                error=None,
            )

        document = await self.table.change(document_id, work)
        if document.pin.is_set:
            self.ingestor.pin(document_id, prompt.block_hashes, document.pin.mode)
        else:
            self.ingestor.unpin(document_id)


class _Run:
    """One attempt at one document."""

    def __init__(
        self,
        segments: Segments,
        document: Document,
        prompt: Prompt,
        turn: Turn,
        on_segment: Callable[[], object],
    ) -> None:
        self._segments = segments
        self._document = document
        self._prompt = prompt
        self._turn = turn
        self._on_segment = on_segment
        self._began = time.monotonic()
        self._num_begun_with = 0
        self._num_computed = 0  # by this attempt
        self._serial = 0

    async def compute_missing(self) -> None:
        """Every segment from the longest stored prefix on."""
        segments, prompt = self._segments, self._prompt
        num_stored = segments.ingestor.num_stored_blocks(prompt.block_hashes)
        if num_stored >= len(prompt.block_hashes) and prompt.block_hashes:
            resumed = len(prompt.token_ids)  # what is behind the last full block is never kept
        else:
            resumed = num_stored * segments.tokens.facts.block_size
        if self._serial == 0:
            self._num_begun_with = resumed
            values = {"num_resumed_tokens": resumed, "num_done": resumed, "num_cached": resumed}
            await self._change(values)
        self._show(resumed)
        for end in segment_ends(resumed, len(prompt.token_ids), segments.segment_tokens):
            await self._turn.renew()
            # By number, not by tokens: part of a segment may be stored when it is begun again.
            number = -(-end // segments.segment_tokens)
            work = Work(DOCUMENT, self._document.document_id, LOADING + number)
            async with segments.gate.work(work):
                await segments.crash_points.pass_by(SEGMENT_BEFORE)
                result = await self._segment(end)
                await segments.crash_points.pass_by(SEGMENT_AFTER)
                self._num_computed += result.num_computed_tokens
                self._show(end)
                await self._written(end, result)
            self._on_segment()

    async def _segment(self, end: int) -> IngestResult:
        segments, document = self._segments, self._document
        self._serial += 1
        request = IngestRequest(
            document_id=document.document_id,
            request_id=f"{document.document_id}-{document.attempt}-{self._serial}",
            token_ids=self._prompt.token_ids.head(end),
            block_hashes=self._prompt.block_hashes[: end // segments.tokens.facts.block_size],
            tenant=document.tenant,
            cache_salt=document.cache_salt,
            ring_size=document.ring_size,
        )
        # What is being made is not evicted for something else that is.
        mode = document.pin.mode if document.pin.is_set else SOFT
        segments.ingestor.pin(document.document_id, request.block_hashes, mode)
        task = asyncio.create_task(segments.ingestor.compute(request, self._show))
        try:
            shown = self._live.num_done
            while not (await asyncio.wait({task}, timeout=segments.limits.progress_interval_s))[0]:
                if self._live.num_done != shown:
                    shown = self._live.num_done
                    await self._change({}, self._progress(document.used_ring_size))
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    async def _written(self, end: int, result: IngestResult) -> None:
        num_computed = result.num_computed_tokens
        progress = self._progress(result.ring_size)

        def work(found: Document) -> Change:
            if found.state is not DocumentState.PREFILLING:
                return stepped(found, DocumentEvent.COMPUTED)  # raises: it was ended meanwhile
            following = msgspec.structs.replace(
                found,
                num_done=end,
                num_computed=found.num_computed + num_computed,
                num_cached=max(0, end - self._num_computed),
                used_ring_size=result.ring_size,
                compute_s=found.compute_s + result.compute_s,
            )
            return Change(following, (progress,))

        self._document = await self._segments.table.change(self._document.document_id, work)

    async def _change(self, values: dict[str, Any], *events: DocumentNotice) -> None:
        self._document = await self._segments.table.change(
            self._document.document_id,
            lambda found: Change(msgspec.structs.replace(found, **values), events),
        )

    @property
    def _live(self) -> Live:
        return self._segments.live[self._document.document_id]

    def _show(self, num_done: int) -> None:
        elapsed = time.monotonic() - self._began
        rate = (num_done - self._num_begun_with) / elapsed if elapsed > 0 else 0.0
        self._segments.live[self._document.document_id] = Live(num_done, max(rate, 0.0))

    def _progress(self, ring_size: int) -> DocumentNotice:
        live, total = self._live, len(self._prompt.token_ids)
        tokens = {
            "total": total,
            "done": live.num_done,
            "cached": max(0, live.num_done - self._num_computed),
        }
        return DocumentNotice(
            "progress",
            {
                "tokens": tokens,
                "chunks": chunks(total, live.num_done, self._segments.segment_tokens),
                "rate_tok_s": round(live.tokens_per_s, 1),
                "eta_s": eta_s(total, live.num_done, live.tokens_per_s),
                "ring_size": ring_size or None,
            },
        )
