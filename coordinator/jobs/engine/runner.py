"""Has the jobs of one kind worked on, a few at a time, wherever the process before was interrupted.

1. After a start, jobs that were worked on are queued again: nothing of them is known but the
   database. What has ended the process is set aside (gate.py).
2. No tenant takes all the room, whatever it has asked for; of one tenant's jobs the order is by
   priority, then age.
3. What passes is tried again, later each time, for as long as it takes; anything else fails the
   job. Its kind says which is which.
"""

import asyncio
import logging
import time
from collections import Counter
from functools import partial
from typing import Any, Generic

from coordinator.errors import internal_error
from coordinator.jobs.engine.gate import Gate, refusal
from coordinator.jobs.engine.job import Failure, J, JobEvent, Kind, Notice
from coordinator.jobs.engine.suspects import Name
from coordinator.jobs.engine.table import JobTable
from protocol.errors import IllegalTransition, RequestError

TICK_S = 0.25  # whether a kind is ready is looked at so often while a job waits for it
_log = logging.getLogger(__name__)


class Runner(Generic[J]):
    """See the module's docstring.

    Args:
        kind: does the work.
        table: of its jobs.
        gate: knows what is set aside.
    """

    def __init__(self, kind: Kind[J], table: JobTable[J], gate: Gate) -> None:
        self._kind = kind
        self._table = table
        self._gate = gate
        self._limits = kind.limits
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._tenants: dict[str, str] = {}  # of the jobs that are worked on
        self._not_before: dict[str, float] = {}  # monotonic
        self._num_retries: Counter[str] = Counter()
        self._bug: BaseException | None = None
        self._wakeup = asyncio.Event()

    def wake(self) -> None:
        """There may be something to do."""
        self._wakeup.set()

    async def recover(self) -> None:
        """Queue what a process that has ended was working on; before ``run``."""
        for job in await self._table.in_states(self._table.of.BEGUN):
            await self._step(job.id, JobEvent.REQUEUE)
        for job_id in self._gate.set_aside(self._table.of.KIND):
            suspect = self._gate.verdict(Name(self._table.of.KIND, job_id))
            assert suspect is not None, "it is one that the gate named"
            failure = Failure.of(refusal(suspect))
            _log.warning("%s: %s", job_id, failure.message)
            await self._step(job_id, JobEvent.SET_ASIDE, error=failure)

    async def run(self) -> None:
        """Work until cancelled; then what runs is aborted, and stays in the database as it is."""
        try:
            while self._bug is None:
                self._wakeup.clear()
                timeout_s = await self._dispatch()
                try:
                    async with asyncio.timeout(timeout_s):
                        await self._wakeup.wait()
                except TimeoutError:
                    continue
            raise self._bug
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def abort(self, job_id: str) -> None:
        """Stop working on a job, everywhere; returns when nothing of it goes on."""
        task = self._tasks.get(job_id)
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        self._forget(job_id)

    async def _dispatch(self) -> float | None:
        """Begin what can begin now; after how long to look again, if nobody will wake us."""
        limits = self._limits
        room = limits.max_tenants * limits.max_of_tenant - len(self._tasks)
        if room <= 0:
            return None
        # What could not be written when an attempt ended, for want of room on the disk.
        begun = await self._table.in_states(self._table.of.BEGUN)
        lost = [job for job in begun if job.id not in self._tasks]
        for job in lost:
            await self._step(job.id, JobEvent.REQUEUE)
        most = limits.max_of_tenant + len(self._tasks) + len(self._not_before)
        waiting = [j for j in await self._table.waiting(most) if j.id not in self._tasks]
        if not self._kind.is_ready:
            return TICK_S if waiting or lost else None
        now = time.monotonic()
        busy = Counter(self._tenants.values())
        later = []
        for job in waiting:
            if (at := self._not_before.get(job.id, 0.0)) > now:
                later.append(at)
            elif busy[job.tenant] < limits.max_of_tenant and room > 0:
                room -= 1
                busy[job.tenant] += 1
                self._begin(job)
        if lost:
            return TICK_S
        return max(0.0, min(later) - now) if later else None

    def _begin(self, job: J) -> None:
        self._tasks[job.id] = task = asyncio.create_task(self._attempt(job), name=job.id)
        self._tenants[job.id] = job.tenant
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task.get_name()], self._tenants[task.get_name()]
        if not task.cancelled() and task.exception() is not None:
            self._bug = task.exception()
        self.wake()

    def _forget(self, job_id: str) -> None:
        self._not_before.pop(job_id, None)
        self._num_retries.pop(job_id, None)

    # -- one attempt -------------------------------------------------------------------------------

    async def _attempt(self, job: J) -> None:
        try:
            await self._kind.work(job, partial(self._progressed, job.id))
            self._forget(job.id)
        except IllegalTransition as error:  # its owner, or time, has ended it meanwhile
            _log.info("%s: %s", job.id, error)
        except RequestError as error:
            if error.code != self._table.not_found().code:  # else it was deleted meanwhile
                await self._on_error(job.id, error)
        except Exception as error:  # noqa: BLE001 - the outermost frame of a job: the others go on
            _log.exception("%s failed by a bug", job.id)
            await self._on_error(job.id, error)

    def _progressed(self, job_id: str) -> None:
        self._num_retries.pop(job_id, None)

    async def _on_error(self, job_id: str, error: Exception) -> None:
        failure = self._kind.failure_of(error)
        if failure is not None:
            _log.warning("%s failed: %s", job_id, failure.message)
            await self._step(job_id, JobEvent.FAIL, error=failure)
            self._kind.let_go(job_id)
            self._forget(job_id)
            return
        delay_s = self._limits.retry_s * 2 ** min(self._num_retries[job_id], 16)
        delay_s = min(self._limits.max_retry_s, delay_s)
        self._num_retries[job_id] += 1
        self._not_before[job_id] = time.monotonic() + delay_s
        told = error if isinstance(error, RequestError) else internal_error()
        _log.warning("%s: %s; tried again in %.1f s", job_id, told, delay_s)
        data = {"code": told.code, "message": told.message, "retry_in_s": delay_s}
        await self._step(job_id, JobEvent.REQUEUE, Notice("warning", data))

    async def _step(
        self,
        job_id: str,
        event: JobEvent,
        *notices: Notice,
        **changes: Any,  # noqa: ANN401 - fields of the job
    ) -> None:
        """Change the state, unless the job was ended or deleted by its owner meanwhile."""

        def work(job: J) -> J | None:
            if event is JobEvent.REQUEUE and job.state not in job.BEGUN:
                return job if job.is_pending else None  # its state is one to go on from
            return job.after(event, **changes)

        try:
            await self._table.change(job_id, work, *notices)
        except (IllegalTransition, RequestError) as error:
            _log.info("%s: %s", job_id, error)
