"""One text worker, seen from the coordinator: its process, its socket, and how it may end."""

import asyncio
import contextlib
import mmap
import os
import signal
import socket
import sys

import msgspec

from coordinator.loop.timeouts import patient
from coordinator.text.frames import memory_file, receive, send
from coordinator.text.tasks import Call, Ready, Result, Settings, Stage
from protocol.errors import BatonError

START_TIMEOUT_S = 60.0
SILENCE_FACTOR = 4  # a worker that its own timer has not ended after so many timeouts is stopped
_DECODER: msgspec.msgpack.Decoder[Result] = msgspec.msgpack.Decoder(Result)


class WorkerLost(BatonError):
    """The process has ended, or was killed; ``is_late`` if it took too long, at ``stage``."""

    def __init__(self, how: str, stage: Stage, *, is_late: bool) -> None:
        super().__init__(how)
        self.stage = stage
        self.is_late = is_late


class WorkerProcess:
    """A process that does one task at a time. Use :meth:`started`."""

    def __init__(
        self, process: asyncio.subprocess.Process, connection: socket.socket, stage: mmap.mmap
    ) -> None:
        self._process = process
        self._connection = connection
        self._stage = stage

    @staticmethod
    async def started(settings: Settings) -> "WorkerProcess":
        """A worker that waits for its first task.

        Raises:
            WorkerLost: it has ended before.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        byte = memory_file(b"\0")
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "coordinator.text.worker", str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
            worker = WorkerProcess(process, ours, mmap.mmap(byte, 1))
            try:
                send(ours, settings, byte)
                said = await worker._answer(START_TIMEOUT_S)
                assert isinstance(said, Ready), said
            except BaseException:
                await worker.end()
                raise
            return worker
        finally:
            theirs.close()
            os.close(byte)

    async def do(self, call: Call, file: int | None, timeout_s: float) -> Result:
        """The answer to a task. When it is cancelled, the worker must be ended.

        Raises:
            WorkerLost: the process has not survived the task.
        """
        try:
            send(self._connection, call, file)
        except OSError:
            raise await self._lost() from None
        return await self._answer(timeout_s)

    async def _answer(self, timeout_s: float) -> Result:
        try:
            async with patient(timeout_s):
                await _readable(self._connection)
        except TimeoutError:  # stopped, or the machine is: its own timer would have ended it
            lost = WorkerLost("it was silent", Stage(self._stage[0]), is_late=True)
            await self.end()
            raise lost from None
        try:
            frame, _ = receive(self._connection)
        except OSError:
            frame = b""
        if not frame:
            raise await self._lost()
        return _DECODER.decode(frame)

    async def _lost(self) -> WorkerLost:
        stage = Stage(self._stage[0])
        code = await self.end()
        if code == -signal.SIGALRM:
            return WorkerLost("it took too long", stage, is_late=True)
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return WorkerLost(how, stage, is_late=False)

    async def end(self) -> int:
        """Kill it if it still runs; how it ended. Idempotent."""
        self._connection.close()
        process = self._process
        if process.returncode is None:
            # Not process.kill(): that polls first, which takes the code of one that has just ended
            # from asyncio's watcher, who then makes one up (255). A dead one minds no signal.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        return await process.wait()


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(connection, tell)
    try:
        await readable
    finally:
        loop.remove_reader(connection)
