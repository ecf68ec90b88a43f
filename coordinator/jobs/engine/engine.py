"""The durable jobs of one kind: what their owners may do with them, and what time does to them.

Every method that takes a tenant is for that tenant alone. Once a second, and after each deletion:

1. A job whose time is over is changed by its kind, and nobody works on it any more.
2. What a deleted or ended job has left is put away, then forgotten. A crash in between repeats it.
3. The kind looks after what is its own.

A bug that one job brings out keeps none of the others from it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic

from coordinator.config import JobLimits
from coordinator.errors import shutting_down
from coordinator.jobs.engine.database import Superseded
from coordinator.jobs.engine.gate import Gate
from coordinator.jobs.engine.job import J, JobEvent, Kind
from coordinator.jobs.engine.notifier import Watchers
from coordinator.jobs.engine.runner import Runner
from coordinator.jobs.engine.suspects import Name
from coordinator.jobs.engine.table import JobTable, WrittenEvent
from protocol.errors import IllegalTransition, RequestError

TICK_S = 1.0
_log = logging.getLogger(__name__)


class Engine(Generic[J]):
    """All jobs of one kind.

    Args:
        kind: does the work.
        table: of its jobs.
        gate: that the work goes through.
        limits: of those who wait for news.
    """

    def __init__(self, kind: Kind[J], table: JobTable[J], gate: Gate, limits: JobLimits) -> None:
        self.kind = kind
        self.table = table
        self.gate = gate
        self.runner = Runner(kind, table, gate)
        self.watchers = Watchers(limits)
        self._max_wait_s = limits.max_wait_s
        self._wakeup = asyncio.Event()

    # -- for owners --------------------------------------------------------------------------------

    async def wait(self, tenant: str, job_id: str, seconds: float) -> J:
        """The job when nothing is to be done for it any more, or after a time.

        Raises:
            RequestError: there is none (404), or the server ends.
        """
        deadline = time.monotonic() + min(seconds, self._max_wait_s)
        while True:
            if self.table.changes.is_closed:
                raise shutting_down()
            news = self.table.changes.ticket(job_id)
            job = await self.table.get(tenant, job_id)
            left_s = deadline - time.monotonic()
            if not job.is_pending or left_s <= 0:
                return job
            try:
                async with asyncio.timeout(left_s):
                    await news.wait()
            except TimeoutError:
                continue

    async def events(self, job_id: str, after: int) -> tuple[list[WrittenEvent], bool]:
        """Events after a number, and whether there may be more; waits for nothing."""
        found = await self.table.select("job_id = ?", job_id)  # it may be deleted meanwhile
        return await self.table.events(job_id, after), any(job.is_pending for job in found)

    async def cancel(self, tenant: str, job_id: str) -> tuple[J, bool]:
        """End a job; and whether it was running until now.

        Raises:
            RequestError: ``not_cancellable``: it has ended otherwise.
        """
        await self.table.get(tenant, job_id)
        try:
            job = await self.table.change(job_id, lambda found: found.after(JobEvent.CANCEL))
        except IllegalTransition as error:
            job = await self.table.get(tenant, job_id)
            if job.state in job.CANCELLED:
                return job, False
            raise conflict(
                "not_cancellable", job, "only one that is running is cancelled"
            ) from error
        await self._let_go(job_id)
        return job, True

    async def retry(
        self, tenant: str, job_id: str, work: Callable[[J], J | None], code: str, why: str
    ) -> J:
        """Go on with a job that has ended or was set aside; its deaths are forgotten.

        Args:
            tenant: whose it is.
            job_id: which.
            work: pure: the job as it goes on; None if it is on its way already.
            code: of the refusal if the table of its states has no way on.
            why: the same, in words.

        Raises:
            RequestError: with that code.
        """
        await self.table.get(tenant, job_id)
        await self.gate.retry(Name(self.table.of.KIND, job_id))
        try:
            job = await self.table.change(job_id, work)
        except IllegalTransition as error:
            raise conflict(code, await self.table.get(tenant, job_id), why) from error
        self.runner.wake()
        return job

    async def delete(self, tenant: str, job_id: str) -> None:
        """Forget a job, and end it; what it has used is put away afterwards."""
        await self.table.get(tenant, job_id)
        await self.table.delete(job_id)
        await self._let_go(job_id)
        self._wakeup.set()

    async def _let_go(self, job_id: str) -> None:
        await self.runner.abort(job_id)
        self.kind.let_go(job_id)
        self.runner.wake()  # there may be something to do about the end

    # -- what time does ----------------------------------------------------------------------------

    async def recover(self) -> None:
        """After a start, before ``run``: see ``Runner.recover`` and ``Kind.recover``.

        Raises:
            RequestError: the disk is full: to be called again.
        """
        await self.runner.recover()
        await self.kind.recover(await self.table.ids())

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.runner.run())
            tasks.create_task(self._keep_looking())

    async def _keep_looking(self) -> None:
        while True:
            self._wakeup.clear()
            try:
                await self.look_after()
            except RequestError as error:  # a full disk: at the next tick there may be room
                _log.warning("%s jobs are not looked after: %s", self.table.of.KIND, error)
            try:
                async with asyncio.timeout(TICK_S):
                    await self._wakeup.wait()
            except TimeoutError:
                continue

    async def look_after(self) -> None:
        """Do everything that is due now."""
        now = self.table.clock()
        for job in await self.table.select("due_at <= ?", now):
            with contained(job.id):
                after = await self.kind.when_due(job, now)
                if after.state is not job.state:
                    await self._let_go(job.id)
        for job in await self.table.cleanups():
            with contained(job.id):
                await self._let_go(job.id)
                await self.kind.clean_up(job)
                await self.table.cleaned_up(job.id)
        await self.kind.look_after()


@contextmanager
def contained(job_id: str) -> Iterator[None]:
    """Whatever goes wrong with one job keeps none of the others from being looked after."""
    try:
        yield
    except RequestError as error:
        if error.code == "insufficient_storage":
            raise  # nothing can be done for any of them now
        _log.warning("%s: %s", job_id, error)
    except IllegalTransition as error:  # its owner was faster
        _log.info("%s: %s", job_id, error)
    except Superseded:
        raise
    except Exception:  # noqa: BLE001 - the outermost frame of a job: the others go on
        _log.exception("%s failed by a bug", job_id)


def conflict(code: str, job: J, why: str) -> RequestError:
    """What is asked for cannot be done with a job in its state."""
    return RequestError(f"the {job.KIND} is {job.state.value}: {why}", code=code, status=409)
