"""Does the work of the documents, a few at a time, and goes on wherever it was interrupted.

1. After a start, what was being worked on is queued again: nothing of it is known but the database.
   What ended the process is set aside (gate.py).
2. Tenants take turns (turns.py), at reading and at every segment; of one tenant's documents the
   order is by priority, then age. An attempt is counted before the work begins.
3. A source is parsed (in another process) and encoded while other documents are computed.
4. Its KV is computed segment by segment from the longest stored prefix on; each segment that
   returns is durable, and is written down.
5. When every block is seen to be stored it is ready, and its pin begins.
6. What the cluster cannot do at the moment is tried again, later each time, for as long as it
   takes; anything else fails the document.
"""

import asyncio
import logging
import time
from collections import Counter
from typing import Any

from coordinator.config import JobLimits
from coordinator.jobs.documents import states
from coordinator.jobs.documents.document import (
    Change,
    Document,
    DocumentNotice,
    Failure,
    Live,
    stepped,
)
from coordinator.jobs.documents.ingestor import TRY_AGAIN, Ingestor
from coordinator.jobs.documents.pins import PinPolicy
from coordinator.jobs.documents.preparing import Preparing
from coordinator.jobs.documents.segments import READING, Segments
from coordinator.jobs.documents.states import DocumentEvent
from coordinator.jobs.documents.table import DocumentTable
from coordinator.jobs.gate import Gate, refusal
from coordinator.jobs.suspects import DOCUMENT, Name, Work
from coordinator.jobs.turns import FairSlots, Turn, Turns
from protocol.errors import IllegalTransition, RequestError

MAX_TENANTS = 4  # whose documents are in work at one time
TICK_S = 0.25  # the cluster's readiness is looked at so often while something waits for it

_log = logging.getLogger(__name__)


class Runner:
    """The one that works on documents.

    Args:
        table: of the documents.
        preparing: makes tokens of sources.
        ingestor: makes KV of tokens.
        policy: of pins.
        limits: how many at a time, which is known by now, how long between tries.
        gate: that the work goes through.
    """

    def __init__(
        self,
        table: DocumentTable,
        preparing: Preparing,
        ingestor: Ingestor,
        policy: PinPolicy,
        limits: JobLimits,
        gate: Gate,
    ) -> None:
        self._table = table
        self._preparing = preparing
        self._ingestor = ingestor
        self._policy = policy
        self._limits = limits
        self._gate = gate
        self._segments = Segments(
            table, ingestor, limits, preparing.tokens, preparing.crash_points, gate
        )
        num_readers, max_running = limits.max_reading, limits.max_running
        self._reading = FairSlots(Turns(num_readers, max(1, num_readers - 1)), time.monotonic)
        self._computing = FairSlots(Turns(max_running, max_running), time.monotonic)
        # The next ones are read while others are computed.
        self._max_of_tenant = max_running + max(1, num_readers - 1)
        self._work: dict[str, asyncio.Task[None]] = {}
        self._tenants: dict[str, str] = {}  # of the documents in work
        self._not_before: dict[str, float] = {}  # monotonic
        self._num_retries: dict[str, int] = {}
        self._buggy: list[str] = []  # that are still to be failed
        self._wakeup = asyncio.Event()

    @property
    def num_running(self) -> int:
        return len(self._work)

    def live(self, document_id: str) -> Live | None:
        """How a running document stands right now."""
        return self._segments.live.get(document_id)

    def wake(self) -> None:
        """There may be something to do."""
        self._wakeup.set()

    async def recover(self) -> None:
        """Queue what a process that has ended was working on; before ``run``."""
        for document in await self._table.with_states(states.WORKING):
            await self._end_attempt(document.document_id, DocumentEvent.REQUEUE)
        for document_id in self._gate.set_aside(DOCUMENT):
            await self._set_aside(document_id)

    async def _set_aside(self, document_id: str) -> None:
        suspect = self._gate.verdict(Name(DOCUMENT, document_id))
        assert suspect is not None, "it is one that the gate named"
        failure = Failure.of(refusal(suspect))
        _log.warning("%s: %s", document_id, failure.message)
        await self._end_attempt(document_id, DocumentEvent.SET_ASIDE, error=failure)

    async def run(self) -> None:
        """Work until cancelled; then what runs is aborted, and stays in the database as it is."""
        try:
            while True:
                self._wakeup.clear()
                timeout_s = await self._dispatch()
                try:
                    async with asyncio.timeout(timeout_s):
                        await self._wakeup.wait()
                except TimeoutError:
                    continue
        finally:
            for task in self._work.values():
                task.cancel()
            await asyncio.gather(*self._work.values(), return_exceptions=True)

    async def abort(self, document_id: str) -> None:
        """Stop working on a document, everywhere; returns when nothing of it goes on."""
        task = self._work.get(document_id)
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        self._forget(document_id)

    async def _dispatch(self) -> float | None:
        """Begin what can begin now; after how long to look again, if nobody will tell."""
        while self._buggy:
            await self._fail(self._buggy.pop(), Failure("internal_error", "internal error"))
        room = MAX_TENANTS * self._max_of_tenant - len(self._work)
        if room <= 0:
            return None
        # What could not be written when an attempt ended, for want of room on the disk.
        lost = [d for d in await self._table.with_states(states.WORKING) if self._is_idle(d)]
        for document in lost:
            await self._end_attempt(document.document_id, DocumentEvent.REQUEUE)
        limit = self._max_of_tenant + len(self._work) + len(self._not_before)
        queued = [d for d in await self._table.queued(limit) if self._is_idle(d)]
        if not self._ingestor.is_ready:
            return TICK_S if queued or lost else None
        now = time.monotonic()
        due = [d for d in queued if self._not_before.get(d.document_id, 0.0) <= now]
        busy = Counter(self._tenants.values())
        for document in due:
            if busy[document.tenant] >= self._max_of_tenant or room == 0:
                continue
            room -= 1
            busy[document.tenant] += 1
            self._begin(document)
        later = [self._not_before[d.document_id] for d in queued if d not in due]
        if lost:
            return TICK_S
        return max(0.0, min(later) - now) if later else None

    def _begin(self, document: Document) -> None:
        name = document.document_id
        self._work[name] = task = asyncio.create_task(self._attempt(document), name=name)
        self._tenants[name] = document.tenant
        task.add_done_callback(self._ended)

    def _is_idle(self, document: Document) -> bool:
        return document.document_id not in self._work

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._work.pop(task.get_name(), None)
        self._tenants.pop(task.get_name(), None)
        self._segments.live.pop(task.get_name(), None)
        error = None if task.cancelled() else task.exception()
        if error is not None:  # other documents go on as ever
            _log.error("%s failed by a bug", task.get_name(), exc_info=error)
            self._buggy.append(task.get_name())
        self.wake()

    def _forget(self, document_id: str) -> None:
        self._not_before.pop(document_id, None)
        self._num_retries.pop(document_id, None)

    # -- one attempt -------------------------------------------------------------------------------

    async def _attempt(self, document: Document) -> None:
        document_id = document.document_id
        try:
            await self._make(document)
            self._forget(document_id)
        except IllegalTransition as error:  # it was cancelled or has expired meanwhile
            _log.info("%s: %s", document_id, error)
        except RequestError as error:
            await self._on_error(document_id, error)

    async def _on_error(self, document_id: str, error: RequestError) -> None:
        if error.code in TRY_AGAIN or error.code == "insufficient_storage":
            await self._retry(document_id, error)
        elif error.code != "document_not_found":  # else it was deleted meanwhile
            await self._fail(document_id, Failure.of(error))

    async def _make(self, document: Document) -> None:
        document_id, order = document.document_id, (-document.priority, document.created_at)
        if self._preparing.tokens.is_current(document):
            document = await self._prepare(document)
        else:
            work = Work(DOCUMENT, document_id, READING)
            async with self._reading.turn(document.tenant, order), self._gate.work(work):
                document = await self._prepare(document)
        async with self._computing.turn(document.tenant, order) as turn:
            await self._compute(document, turn)

    async def _prepare(self, document: Document) -> Document:
        document = await self._table.change(
            document.document_id,
            lambda d: stepped(d, DocumentEvent.START, attempt=d.attempt + 1, error=None),
        )
        return await self._preparing.prepare(document)

    async def _compute(self, document: Document, turn: Turn) -> None:
        document_id = document.document_id
        document = await self._table.change(
            document_id,
            lambda d: stepped(d, DocumentEvent.TOKENIZED),
            lambda d, pinned: self._policy.check(d.pin, d.num_tokens, pinned),
        )
        # Whoever gets on is tried again soon.
        await self._segments.compute(
            document, turn, lambda: self._num_retries.pop(document_id, None)
        )

    async def _retry(self, document_id: str, error: RequestError) -> None:
        number = self._num_retries.get(document_id, 0)
        self._num_retries[document_id] = number + 1
        delay_s = min(self._limits.max_retry_s, self._limits.retry_s * 2 ** min(number, 16))
        self._not_before[document_id] = time.monotonic() + delay_s
        data = {"code": error.code, "message": error.message, "retry_in_s": delay_s}
        _log.warning("%s: %s; tried again in %.1f s", document_id, error.message, delay_s)
        await self._end_attempt(document_id, DocumentEvent.REQUEUE, DocumentNotice("warning", data))

    async def _fail(self, document_id: str, failure: Failure) -> None:
        _log.warning("%s failed: %s", document_id, failure.message)
        await self._end_attempt(document_id, DocumentEvent.FAIL, error=failure)
        self._ingestor.unpin(document_id)
        self._forget(document_id)

    async def _end_attempt(
        self,
        document_id: str,
        event: DocumentEvent,
        *events: DocumentNotice,
        **changes: Any,  # noqa: ANN401 - any field
    ) -> None:
        """Take a step, unless the document was ended or deleted by its owner meanwhile."""

        def work(document: Document) -> Change:
            change = stepped(document, event, **changes)
            return Change(change.document, (*events, *change.events))

        try:
            await self._table.change(document_id, work)
        except (IllegalTransition, RequestError) as error:
            _log.info("%s: %s", document_id, error)
