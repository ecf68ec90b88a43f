"""The text workers' tasks in a thread: for tests, and for engines of one process."""

import asyncio

from coordinator.text.tasks import Call, Refused, Result, Settings, Task
from coordinator.text.worker import TextWorker
from coordinator.validation.bodies import NO_BODY, Body
from protocol.errors import RequestError


class InProcessWorkers:
    """As :class:`coordinator.text.workers.TextWorkers`, without processes, limits and deadlines."""

    def __init__(self, settings: Settings) -> None:
        self._worker = TextWorker(settings, lambda _stage, _size: None)

    def start(self) -> None:
        """Nothing is to be started."""

    async def close(self) -> None:
        """Nothing is to be ended."""

    async def run(self, tenant: str, task: Task, body: Body = NO_BODY) -> Result:
        """The answer to a task.

        Raises:
            RequestError: it was refused.
        """
        del tenant
        call = Call(task, memoryview(body.data), body.offset, body.length, body.line)
        result = await asyncio.to_thread(self._worker.do, call, body.file)
        if isinstance(result, Refused):
            raise RequestError(
                result.message, code=result.code, param=result.param, status=result.status
            )
        return result
