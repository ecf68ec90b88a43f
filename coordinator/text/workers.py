"""Everything whose cost depends on a caller's text is done by these processes, never by the loop.

1. ``run`` puts a task into the queue of its lane: small ones, large ones, and those of documents
   each have workers of their own, so that none waits behind a body of another size.
2. A lane's worker takes the tasks of its tenants in turn, one at a time. The first worker of small
   tasks is started with the coordinator, each other one with its first task.
3. A worker that has ended in a task is replaced. What took too long is refused; a task whose worker
   died is tried once more, and then refused. What waited is done by the next one.
"""

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from coordinator.errors import shutting_down
from coordinator.text.fair_queue import FairQueue
from coordinator.text.process import SILENCE_FACTOR, WorkerLost, WorkerProcess
from coordinator.text.tasks import (
    Call,
    EncodeDocument,
    LoadDocument,
    ReadLines,
    Refused,
    Result,
    Settings,
    Stage,
    Task,
)
from coordinator.validation.bodies import NO_BODY, Body
from protocol.errors import RequestError

SMALL_BYTES = 64 << 10  # a larger body waits in the lane of large ones
SLOWEST_BYTES_PER_S = 64 << 10
MAX_WAITING, MAX_TENANT_WAITING = 1024, 512  # tasks of one lane, but for small ones
NUM_TRIES = 2  # of a task whose worker died
BACKOFF_S, MAX_BACKOFF_S = 0.05, 5.0  # before a worker is started again; doubled each time
_OF_DOCUMENTS = (EncodeDocument, LoadDocument, ReadLines)

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Job:
    """A task and who waits for its answer."""

    task: Task
    body: Body
    answer: asyncio.Future[Result]
    num_tries: int = 0

    @property
    def reads_files(self) -> bool:
        """Whether it is about more than its body: how much only the worker sees."""
        named = ("opened", "uploaded")
        is_named = any(getattr(self.task, name, None) is not None for name in named)
        return is_named or isinstance(self.task, _OF_DOCUMENTS)

    def call(self) -> Call:
        body = self.body
        return Call(self.task, memoryview(body.data), body.offset, body.length, body.line)


@dataclass(slots=True)
class _Lane:
    """Tasks of one kind, and the tasks of the loop that have them done."""

    name: str
    num_workers: int
    queue: FairQueue[_Job] = field(
        default_factory=lambda: FairQueue(MAX_WAITING, lambda: MAX_TENANT_WAITING)
    )
    waiting: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    typical_s: float = 0.01  # of a task


class TextWorkers:
    """All of them. Use ``run`` between ``start`` and ``close``.

    Args:
        settings: of every worker.
        num_workers: for small tasks; large ones and documents have one each.
        places: for small tasks that wait, of all tenants and of one. A request has one of them
            before it counts among those that were let in, of which there may be as many.
    """

    def __init__(
        self,
        settings: Settings,
        num_workers: int,
        places: tuple[int, Callable[[], int]] = (MAX_WAITING, lambda: MAX_TENANT_WAITING),
    ) -> None:
        self.counters: Counter[str] = Counter()  # tasks done, and workers lost, by how
        self._settings = settings
        self._small = _Lane("small", num_workers, FairQueue(*places))
        self._large = _Lane("large", 1)
        self._documents = _Lane("documents", 1)
        self._serving: list[asyncio.Task[None]] = []

    @property
    def num_waiting(self) -> int:
        return sum(len(lane.queue) for lane in (self._small, self._large, self._documents))

    def start(self) -> None:
        """Start the workers for small tasks; returns at once.

        A start keeps the loop waiting until the new process has a core, so none is for a burst.
        """
        for lane in (self._small, self._large, self._documents):
            for _ in range(lane.num_workers):
                serving = self._serve(lane, starts_at_once=lane is self._small)
                self._serving.append(asyncio.create_task(serving))

    async def close(self) -> None:
        """End them all; whoever waits for one is told that the server shuts down."""
        for task in self._serving:
            task.cancel()
        if self._serving:
            await asyncio.wait(self._serving)
        self._serving = []
        for lane in (self._small, self._large, self._documents):
            while (job := lane.queue.take()) is not None:
                _refuse(job, shutting_down())

    async def run(self, tenant: str, task: Task, body: Body = NO_BODY) -> Result:
        """The answer to a task, which is not :class:`Refused`.

        Args:
            tenant: whose turn it takes.
            task: what is to be done.
            body: what it is about; stays the caller's.

        Raises:
            RequestError: it was refused, cannot be done, or too much waits.
        """
        job = _Job(task, body, asyncio.get_running_loop().create_future())
        lane = self._lane(job)
        if not lane.queue.put(tenant, job):
            wait_s = len(lane.queue) * lane.typical_s / lane.num_workers
            raise RequestError(
                "too many texts wait to be read",
                code="overloaded",
                status=503,
                retry_after_s=max(1, math.ceil(wait_s)),
            )
        lane.waiting.release()
        try:
            result = await job.answer
        finally:
            lane.queue.remove(tenant, job)
        if isinstance(result, Refused):
            raise RequestError(
                result.message, code=result.code, param=result.param, status=result.status
            )
        return result

    def _lane(self, job: _Job) -> _Lane:
        if isinstance(job.task, _OF_DOCUMENTS):
            return self._documents
        return self._large if job.reads_files or job.body.size > SMALL_BYTES else self._small

    # -- one worker --------------------------------------------------------------------------------

    async def _serve(self, lane: _Lane, *, starts_at_once: bool) -> None:
        worker = await self._replacement() if starts_at_once else None
        try:
            while True:
                await lane.waiting.acquire()
                job = lane.queue.take()
                if job is None or job.answer.done():
                    continue  # given up by who asked
                while not job.answer.done():
                    worker = worker or await self._replacement()
                    worker = await self._do(lane, job, worker)
        finally:
            if worker is not None:
                await worker.end()

    async def _do(self, lane: _Lane, job: _Job, worker: WorkerProcess) -> WorkerProcess | None:
        """Have it done; the worker, if it can do another task."""
        config, loop = self._settings.config, asyncio.get_running_loop()
        began = loop.time()
        size = max(job.body.size, config.limits.max_upload_bytes if job.reads_files else 0)
        silence_s = SILENCE_FACTOR * config.text_timeout_s + size / SLOWEST_BYTES_PER_S
        try:
            with job.body.lent() as file:
                result = await worker.do(job.call(), file, silence_s)
        except WorkerLost as lost:
            self.counters["lost_late" if lost.is_late else "lost_crashed"] += 1
            _log.warning("a text worker was lost at %s: %s", lost.stage.name, lost)
            job.num_tries += 1
            if lost.is_late or job.num_tries >= NUM_TRIES:
                _refuse(job, _too_slow(lost, config.text_timeout_s) if lost.is_late else _died())
            return None
        except asyncio.CancelledError:
            _refuse(job, shutting_down())
            await worker.end()
            raise
        self.counters["done"] += 1
        lane.typical_s += 0.1 * (loop.time() - began - lane.typical_s)
        if not job.answer.done():
            job.answer.set_result(result)
        if isinstance(result, Refused) and result.is_worn:
            self.counters["lost_worn"] += 1
            await worker.end()
            return None
        return worker

    async def _replacement(self) -> WorkerProcess:
        """A new worker, however often it takes to start one."""
        pause_s = BACKOFF_S
        while True:
            try:
                return await WorkerProcess.started(self._settings)
            except (WorkerLost, OSError) as error:
                self.counters["lost_starting"] += 1
                _log.error("a text worker did not start: %s", error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_BACKOFF_S)


def _refuse(job: _Job, error: RequestError) -> None:
    if not job.answer.done():
        job.answer.set_exception(error)


def _died() -> RequestError:
    return RequestError(
        f"{NUM_TRIES} text workers have died while they read this request",
        code="text_worker_lost",
        status=500,
    )


def _too_slow(lost: WorkerLost, timeout_s: float) -> RequestError:
    what, code, param = "reading this body", "text_timeout", None
    if lost.stage is Stage.RENDERING:
        what, code, param = "the model's chat template", "template_error", "messages"
    elif lost.stage is Stage.ENCODING:
        what = "encoding this text"
    return RequestError(
        f"{what} took longer than {timeout_s:g} s and a share for its size "
        f"(coordinator.text_timeout_s)",
        code=code,
        param=param,
    )
