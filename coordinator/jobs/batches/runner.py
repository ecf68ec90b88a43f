"""Has batches done: one task for each that is open, slots for the lines of all of them.

1. VALIDATING: every line is checked and noted; one that is wrong refuses the batch.
2. IN_PROGRESS: a slot, then a line, then its answer, which is kept before the next line takes the
   slot. What the cluster has no room for is tried again.
3. FINALIZING, and the other ends: the files are written, then the batch is over.

After a crash each batch goes on in its state; lines that were under way are run again. A batch or a
line that this process has died of is set aside (gate.py).
"""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import msgspec

from coordinator.errors import error_object
from coordinator.jobs.batches.batch import (
    DOCUMENTS,
    Batch,
    Claim,
    Line,
    LineEdit,
    LineError,
    Result,
    answered,
)
from coordinator.jobs.batches.batches import Batches, line_key
from coordinator.jobs.batches.output import write_files
from coordinator.jobs.batches.slots import Slots
from coordinator.jobs.batches.states import OPEN, RUNNING, BatchEvent, BatchState
from coordinator.jobs.gate import refusal
from coordinator.jobs.suspects import BATCH, LINE, Name, Work
from coordinator.text.tasks import Lines, ReadLines, Workers
from coordinator.validation.bodies import Body
from protocol.errors import RequestError
from protocol.failpoints import RESULT_ANSWERED

TICK_S = 1.0
TRY_AGAIN = frozenset({429, 503, 507})  # there may be room later
MAX_DOCUMENTS = 8  # of one batch that are waited for; making them is not this runner's work

ENDED = frozenset(
    {BatchState.COMPLETED, BatchState.EXPIRED, BatchState.CANCELLED, BatchState.SET_ASIDE}
)
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

        ``body`` is the line with what is put into it (batch_input.request_of). A line to
        ``/v1/documents`` is answered when the document is ready, or has failed. It has an
        ``idempotency_key``: asked again, the same document is meant.
        """


class BatchRunner:
    """See the module's docstring.

    Args:
        batches: what is to be done.
        server: does it.
        workers: read the lines.
    """

    def __init__(self, batches: Batches, server: LineServer, workers: Workers) -> None:
        self._workers = workers
        self._batches = batches
        self._table = batches.table
        self._limits = batches.limits
        self._gate = batches.gate
        self._server = server
        self._slots = Slots(self._limits.max_running, self._is_quiet)
        self._validating = asyncio.Semaphore(1)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._answering: dict[str, asyncio.Task[None]] = {}
        self._busy: dict[str, dict[int, asyncio.Task[None]]] = {}
        self._wakeup = asyncio.Event()
        batches.attach(self._on_change)

    async def run(self) -> None:
        """Until cancelled. What was under way then is run again after the next start."""
        await self._recover_patiently()
        try:
            while True:
                self._wakeup.clear()
                await self._tick()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TICK_S):
                        await self._wakeup.wait()
        finally:
            await _end(*self._tasks.values())

    async def _set_aside(self, batch_id: str) -> None:
        suspect = self._gate.verdict(Name(BATCH, batch_id))
        assert suspect is not None, "it is one that the gate named"
        why, now = refusal(suspect), self._table.clock()

        def work(batch: Batch) -> Batch:
            if batch.state not in OPEN:
                return batch
            errors = (LineError(why.code, why.message),)
            return batch.stepped(BatchEvent.SET_ASIDE, now, errors=errors)

        if await self._table.find(batch_id) is not None:
            await self._table.change(batch_id, work)

    async def _recover_patiently(self) -> None:
        while True:
            try:
                return await self._recover()
            except RequestError as error:  # a full disk: requests are served nevertheless
                _log.error("batches wait: %s", error)
                await asyncio.sleep(TICK_S)

    async def _recover(self) -> None:
        await self._gate.wait_recovered()
        for batch_id in self._gate.set_aside(BATCH):
            await self._set_aside(batch_id)
        kept = [*await self._table.open_ids(), *await self._table.set_aside_ids()]
        await asyncio.to_thread(self._batches.inputs.recover, kept)
        for batch_id in await self._table.leftovers():
            await self._table.remove_lines(batch_id)

    async def _tick(self) -> None:
        try:
            await self._batches.files.remove_expired()
            await self._expire()
            for batch_id in await self._table.open_ids():
                if batch_id not in self._tasks:
                    task = asyncio.create_task(self._keep_on(batch_id))
                    self._tasks[batch_id] = task
                    task.add_done_callback(lambda _, name=batch_id: self._tasks.pop(name))  # type: ignore[misc]
        except RequestError as error:  # a full disk: at the next tick there may be room
            _log.warning("batches are not looked after: %s", error)

    async def _expire(self) -> None:
        now = self._table.clock()

        def work(batch: Batch) -> Batch:
            return batch.stepped(BatchEvent.EXPIRE, now) if batch.state in RUNNING else batch

        for batch_id in await self._table.expired_ids():
            await self._table.change(batch_id, work)
            self._interrupt(batch_id)
        await self._table.forget(int(now - self._limits.keep_s))

    def _on_change(self, batch_id: str) -> None:
        self._interrupt(batch_id)
        self._wakeup.set()

    def _interrupt(self, batch_id: str) -> None:
        answering = self._answering.get(batch_id)
        if answering is not None:
            answering.cancel()

    def _is_quiet(self) -> bool:
        others = self._server.num_interactive
        return others is not None and others <= self._limits.max_interactive

    # -- one batch ---------------------------------------------------------------------------------

    async def _keep_on(self, batch_id: str) -> None:
        pause_s = self._limits.retry_s
        while True:
            try:
                if not await self._step(batch_id):
                    return
                pause_s = self._limits.retry_s
                continue
            except RequestError as error:
                _log.warning("%s cannot go on for now: %s", batch_id, error)
            except Exception:  # noqa: BLE001 - the outermost frame of a batch: the others go on
                _log.exception("%s was stopped by a bug, and is tried again", batch_id)
            pause_s = min(2 * pause_s, self._limits.max_retry_s)
            await asyncio.sleep(pause_s)

    async def _step(self, batch_id: str) -> bool:
        """Bring a batch into its next state; False at its end."""
        batch = await self._table.find(batch_id)
        if batch is None or batch.state in ENDED:
            return False
        if batch.state is BatchState.VALIDATING:
            work = Work(BATCH, batch_id, VALIDATION)
            async with self._validating, self._gate.work(work):
                await self._validate(batch)
        elif batch.state is BatchState.IN_PROGRESS:
            await self._answer_lines(batch)
        elif batch.state is BatchState.FAILED:
            await asyncio.to_thread(self._batches.inputs.remove, batch_id)
            return False
        else:
            async with self._gate.work(Work(BATCH, batch_id, FILES)):
                await self._finish(batch)
            await self._batches.forgive(batch_id)
        return True

    async def _validate(self, batch: Batch) -> None:
        with self._batches.inputs.whole(batch.batch_id) as body:
            found = await self._workers.run(batch.tenant, ReadLines(batch.endpoint), body)
        assert isinstance(found, Lines), found
        if found.errors:
            await self._table.refuse(batch.batch_id, found.errors)
            return
        lines: list[Line] = []
        for piece in found.pieces:
            lines += msgspec.msgpack.decode(piece, type=list[Line])
            await asyncio.sleep(0)  # many lines are taken in many steps
        await self._table.add_lines(batch.batch_id, lines)
        now = self._table.clock()

        def work(found: Batch) -> Batch:
            if found.state is not BatchState.VALIDATING:
                return found  # cancelled meanwhile
            return found.stepped(BatchEvent.VALID, now, num_lines=len(lines))

        await self._table.change(batch.batch_id, work)

    async def _finish(self, batch: Batch) -> None:
        if batch.num_lines > 0:
            files = await write_files(batch, self._table, self._batches.files)
            await self._table.close(batch.batch_id, files)
        else:  # it ended before it was validated
            await self._table.close(batch.batch_id, [])
        await self._table.remove_lines(batch.batch_id)
        await asyncio.to_thread(self._batches.inputs.remove, batch.batch_id)

    # -- its lines ---------------------------------------------------------------------------------

    async def _answer_lines(self, batch: Batch) -> None:
        answering = asyncio.create_task(self._claim_lines(batch))
        self._answering[batch.batch_id] = answering
        try:
            # Another state may have been entered before there was something to interrupt.
            found = await self._table.find(batch.batch_id)
            if found is None or found.state is not BatchState.IN_PROGRESS:
                answering.cancel()
            await asyncio.wait({answering})
            if answering.cancelled():
                return
            answering.result()
        finally:
            del self._answering[batch.batch_id]
            await _end(answering)
        now = self._table.clock()

        def work(found: Batch) -> Batch:
            return (
                found.stepped(BatchEvent.DONE, now)
                if found.state is BatchState.IN_PROGRESS
                else found
            )

        await self._table.change(batch.batch_id, work)

    async def _claim_lines(self, batch: Batch) -> None:
        busy = self._busy[batch.batch_id] = {}
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    await self._slots.acquire()
                    claimed = await self._with_slot(batch, busy, group)
                    if claimed:
                        continue
                    if claimed is None:
                        return
                    if busy:
                        await asyncio.wait(busy.values(), return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._busy[batch.batch_id]

    async def _with_slot(
        self, batch: Batch, busy: dict[int, asyncio.Task[None]], group: asyncio.TaskGroup
    ) -> bool | None:
        """Begin a line with a slot that is had: whether there was one; None when all are done."""
        was_idle = not busy
        num_documents = sum(task.get_name() == DOCUMENTS for task in busy.values())
        task: asyncio.Task[None] | None = None
        try:
            # An error would end the lines that are under way.
            claim = await self._patiently(
                lambda: self._table.claim(
                    batch.batch_id, list(busy), takes_documents=num_documents < MAX_DOCUMENTS
                ),
                "a batch's line cannot be begun",
            )
            if claim is None:
                return None if was_idle else False
            number, url = claim.line.number, claim.line.url
            task = group.create_task(self._answer(batch, claim), name=url)
            busy[number] = task
            task.add_done_callback(lambda _: busy.pop(number))
            if url != DOCUMENTS:
                task.add_done_callback(lambda _: self._slots.release())
            return True
        finally:
            if task is None or task.get_name() == DOCUMENTS:
                self._slots.release()

    async def _answer(self, batch: Batch, claim: Claim) -> None:
        result = await self._result(batch, claim)
        await self._batches.files.crash_points.pass_by(RESULT_ANSWERED)
        await self._patiently(
            lambda: self._table.record(batch.batch_id, claim.line.number, result),
            "a batch's answer cannot be kept",
        )

    async def _patiently(self, work: Callable[[], Awaitable[T]], otherwise: str) -> T:
        """No answer is thrown away because the disk is full for a while."""
        pause_s = self._limits.retry_s
        while True:
            try:
                return await work()
            except RequestError as error:
                _log.warning("%s for now: %s", otherwise, error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._limits.max_retry_s)

    async def _result(self, batch: Batch, claim: Claim) -> Result:
        line, pause_s = claim.line, self._limits.retry_s
        while True:
            request_id = uuid.uuid4().hex
            reply = await self._reply(batch, claim, request_id)
            if reply[0] not in TRY_AGAIN:
                return answered(batch, line, reply, request_id)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._limits.max_retry_s)

    async def _reply(self, batch: Batch, claim: Claim, request_id: str) -> Reply:
        line = claim.line
        try:
            _check(claim)
            key = line_key(batch.batch_id, line.number)
            edit = LineEdit(claim.document_id, key if line.url == DOCUMENTS else None)
            with self._batches.inputs.line(batch.batch_id, line, edit) as body:
                if line.url != DOCUMENTS:
                    async with self._gate.work(Work(LINE, key)):
                        return await self._server.serve(batch.tenant, line.url, body, request_id)
                # It waits for other work, the document's, which goes through the gate itself.
                return await self._server.serve(batch.tenant, line.url, body, request_id)
        except RequestError as error:
            return error.status, error_object(error)


def _check(claim: Claim) -> None:
    if claim.line.depends_on is not None and claim.document_id is None:
        raise RequestError(
            "the line that makes the document has failed: see its error",
            code="dependency_failed",
            param="document_id",
            status=424,
        )


async def _end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
