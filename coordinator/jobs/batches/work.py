"""Batches as a kind of work: the lines of a file, each answered as a request is.

1. VALIDATING: every line is checked and noted; one that is wrong refuses the batch.
2. IN_PROGRESS: a slot, then a line, then its answer, which is kept before the next line takes the
   slot. What the cluster has no room for is tried again.
3. FINALIZING, and the other ends: the files are written, then the batch is over.

After a crash a batch goes on in its state; lines that were under way are run again. A batch or a
line that this process has died of is set aside (engine/gate.py).
"""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Protocol, TypeVar

import msgspec

from coordinator.errors import error_object
from coordinator.jobs.batches.batch import (
    DOCUMENTS,
    Batch,
    Claim,
    Line,
    LineEdit,
    Result,
    answered,
)
from coordinator.jobs.batches.batches import BatchParts, line_key
from coordinator.jobs.batches.input import opened
from coordinator.jobs.batches.output import write_files
from coordinator.jobs.batches.states import RUNNING, BatchEvent, BatchState
from coordinator.jobs.engine.job import Failure, JobEvent, Kind, WorkLimits
from coordinator.jobs.engine.suspects import LINE, Work
from coordinator.jobs.engine.table import Connection
from coordinator.jobs.engine.turns import FairSlots
from coordinator.jobs.files.files import StoredFile, insert_file
from coordinator.text.tasks import Lines, ReadLines, Workers
from coordinator.validation.bodies import Body
from protocol.errors import RequestError
from protocol.process.failpoints import RESULT_ANSWERED

LOOK_S = 0.05  # the load is many requests' doing: it is looked at, nobody tells of it
TRY_AGAIN = frozenset({429, 503, 507})  # there may be room later
MAX_DOCUMENTS = 8  # of one batch that are waited for; making them is not its own work
VALIDATION, FILES = 0, 1  # positions of a batch's work, for the gate

T = TypeVar("T")
Reply = tuple[int, dict[str, Any]]
_log = logging.getLogger(__name__)


class LineServer(Protocol):
    """Answers the requests of lines, as HTTP would."""

    @property
    def num_interactive(self) -> int | None:
        """Sequences in the cluster that are not of lines; None while it serves nobody."""

    async def serve(self, tenant: str, url: str, body: Body, request_id: str) -> Reply:
        """Status and body. May be cancelled; then nothing of it goes on.

        ``body`` is the line with what is put into it (``input.request_of``). A line to
        ``/v1/documents`` is answered when the document is ready, or has failed. It has an
        ``idempotency_key``: asked again, the same document is meant.
        """


class BatchWork(Kind[Batch]):
    """See the module's docstring.

    Args:
        parts: of the batches.
        workers: read the lines.
    """

    server: LineServer  # answers the lines; set before the work begins

    def __init__(self, parts: BatchParts, workers: Workers) -> None:
        limits = parts.limits
        self.limits = WorkLimits(
            max_of_tenant=limits.max_open,
            max_tenants=-(-limits.max_all_open // limits.max_open),
            retry_s=limits.retry_s,
            max_retry_s=limits.max_retry_s,
        )
        self._parts = parts
        self._workers = workers
        self._validating = FairSlots(1, 1)
        self._slots = FairSlots(limits.max_running, limits.max_running)

    async def work(self, job: Batch, on_progress: Callable[[], None]) -> None:
        # A state that was entered before this task could be aborted must be seen.
        batch = await self._parts.table.get(job.tenant, job.id)
        while batch.is_pending:
            batch = await self._step(batch)
            on_progress()

    async def _step(self, batch: Batch) -> Batch:
        """Bring a batch into its next state."""
        if batch.state is BatchState.IN_PROGRESS:
            return await self._answer_lines(batch)
        if batch.state is BatchState.VALIDATING:
            work = Work(Batch.KIND, batch.id, VALIDATION)
            turn = self._validating.turn(batch.tenant, (batch.created_at,))
            async with turn, self._parts.gate.work(work):
                return await self._validate(batch)
        async with self._parts.gate.work(Work(Batch.KIND, batch.id, FILES)):
            batch = await self._finish(batch)
        await self._parts.forgive(batch.id)
        return batch

    def failure_of(self, error: Exception) -> Failure | None:  # noqa: ARG002 - the engine's call
        return None  # a batch fails by its lines; whatever else goes wrong may pass

    async def when_due(self, batch: Batch, now: float) -> Batch:  # noqa: ARG002 - the engine's call
        if batch.state not in RUNNING:
            await self._parts.table.delete(batch.id)  # nobody looks at it any more
            return batch
        return await self._parts.table.change(batch.id, lambda found: found.after(JobEvent.EXPIRE))

    async def clean_up(self, batch: Batch) -> None:
        await self._parts.lines.remove(batch.id)
        await asyncio.to_thread(self._parts.inputs.remove, batch.id)

    async def look_after(self) -> None:
        await self._parts.files.remove_expired()

    async def recover(self, known: Collection[str]) -> None:
        await asyncio.to_thread(self._parts.inputs.sweep, known)

    async def _validate(self, batch: Batch) -> Batch:
        with opened(self._parts.inputs / batch.id) as body:
            found = await self._workers.run(batch.tenant, ReadLines(batch.endpoint), body)
        assert isinstance(found, Lines), found
        if errors := tuple(found.errors):
            return await self._parts.table.change(
                batch.id, lambda kept: kept.after(BatchEvent.REFUSE, errors=errors)
            )
        lines: list[Line] = []
        for piece in found.pieces:
            lines += msgspec.msgpack.decode(piece, type=list[Line])
            await asyncio.sleep(0)  # many lines are taken in many steps
        await self._parts.lines.add(batch.id, lines)
        return await self._parts.table.change(
            batch.id, lambda kept: kept.after(BatchEvent.VALID, num_lines=len(lines))
        )

    async def _finish(self, batch: Batch) -> Batch:
        parts, written = self._parts, list[StoredFile]()
        if batch.num_lines:  # else it ended before it was validated
            written = await write_files(batch, parts.lines, parts.files)
        names = {file.file_id for file in written}

        def insert(connection: Connection, _: Batch) -> None:
            for file in written:
                insert_file(connection, file)

        return await self._parts.table.change(
            batch.id,
            lambda found: found.after(
                BatchEvent.WRITTEN,
                has_output=found.output_file_id in names,
                has_errors=found.error_file_id in names,
            ),
            also=insert,
            name="closed",
        )

    # -- lines -------------------------------------------------------------------------------------

    async def _answer_lines(self, batch: Batch) -> Batch:
        busy: dict[int, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                slot = await self._slot(batch)
                was_idle = not busy
                if await self._begin_line(batch, slot, busy, group):
                    continue
                if was_idle:
                    break
                if busy:
                    await asyncio.wait(busy.values(), return_when=asyncio.FIRST_COMPLETED)
        return await self._parts.table.change(batch.id, lambda found: found.after(BatchEvent.DONE))

    async def _slot(self, batch: Batch) -> int:
        """Wait for a slot, then for a moment in which the cluster serves and others ask little."""
        slot = await self._slots.acquire(batch.tenant, (0.0,))
        try:
            while not self._is_quiet():  # noqa: ASYNC110 - see LOOK_S
                await asyncio.sleep(LOOK_S)
        except BaseException:
            self._slots.release(slot)
            raise
        return slot

    def _is_quiet(self) -> bool:
        others = self.server.num_interactive
        return others is not None and others <= self._parts.limits.max_interactive

    async def _begin_line(
        self,
        batch: Batch,
        slot: int,
        busy: dict[int, asyncio.Task[None]],
        group: asyncio.TaskGroup,
    ) -> bool:
        """Begin a line with a slot that is had, or give it back: whether there was a line."""
        num_documents = sum(task.get_name() == DOCUMENTS for task in busy.values())
        holds_slot = False
        try:
            # An error would end the lines that are under way.
            claim = await self._patiently(
                lambda: self._parts.lines.claim(
                    batch.id, list(busy), takes_documents=num_documents < MAX_DOCUMENTS
                ),
                "a batch's line cannot be begun",
            )
            if claim is None:
                return False
            number, url = claim.line.number, claim.line.url
            task = group.create_task(self._answer(batch, claim), name=url)
            busy[number] = task
            task.add_done_callback(lambda _: busy.pop(number))
            if url != DOCUMENTS:  # waiting for a document takes no slot
                task.add_done_callback(lambda _: self._slots.release(slot))
                holds_slot = True
            return True
        finally:
            if not holds_slot:
                self._slots.release(slot)

    async def _answer(self, batch: Batch, claim: Claim) -> None:
        result = await self._result(batch, claim)
        await self._parts.files.folder.crash_points.pass_by(RESULT_ANSWERED)
        await self._patiently(
            lambda: self._parts.lines.record(batch.id, claim.line.number, result),
            "a batch's answer cannot be kept",
        )

    async def _patiently(self, work: Callable[[], Awaitable[T]], otherwise: str) -> T:
        """No answer is thrown away because the disk is full for a while."""
        pause_s = self.limits.retry_s
        while True:
            try:
                return await work()
            except RequestError as error:
                _log.warning("%s for now: %s", otherwise, error)
            pause_s = await self._pause(pause_s)

    async def _result(self, batch: Batch, claim: Claim) -> Result:
        pause_s = self.limits.retry_s
        while True:
            request_id = uuid.uuid4().hex
            reply = await self._reply(batch, claim, request_id)
            if reply[0] not in TRY_AGAIN:
                return answered(batch, claim.line, reply, request_id)
            pause_s = await self._pause(pause_s)

    async def _pause(self, pause_s: float) -> float:
        """Wait; how long to wait the next time."""
        await asyncio.sleep(pause_s)
        return min(2 * pause_s, self.limits.max_retry_s)

    async def _reply(self, batch: Batch, claim: Claim, request_id: str) -> Reply:
        line = claim.line
        key = line_key(batch.id, line.number)
        is_document = line.url == DOCUMENTS
        edit = LineEdit(claim.document_id, key if is_document else None)
        try:
            if line.depends_on is not None and claim.document_id is None:
                raise _dependency_failed()
            with opened(self._parts.inputs / batch.id, line, edit) as body:
                if is_document:
                    # It waits for other work, the document's, which goes through the gate itself.
                    return await self.server.serve(batch.tenant, line.url, body, request_id)
                async with self._parts.gate.work(Work(LINE, key)):
                    return await self.server.serve(batch.tenant, line.url, body, request_id)
        except RequestError as error:
            return error.status, error_object(error)


def _dependency_failed() -> RequestError:
    return RequestError(
        "the line that makes the document has failed: see its error",
        code="dependency_failed",
        param="document_id",
        status=424,
    )
