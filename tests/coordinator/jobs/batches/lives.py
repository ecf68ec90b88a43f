"""Lives of a coordinator that makes batches and works on them, each a process of its own.

Started with a folder; then for each line on standard input: ``live`` begins a life and prints its
process id; the next line is read when it has ended. ``drain`` is a life that makes nothing new, and
ends when everything is done. Everything is imported once: a life is a fork.
"""

import asyncio
import itertools
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any

from coordinator.auth import Tenants
from coordinator.config import JobLimits, public
from coordinator.control import Owner
from coordinator.http.frontend import Frontend
from coordinator.http.line_server import LineServer
from coordinator.jobs.batches.batches import BatchRequest
from coordinator.jobs.files import BATCH, StoredFile, new_file_id
from coordinator.text.in_process import InProcessWorkers
from coordinator.text.tasks import Settings
from tests.campaign.jobs.asked import batch_lines
from tests.coordinator.conftest import FakeCluster
from tests.coordinator.jobs.batches.composition import (
    POOLS,
    Server,
    WithBatches,
    config_of,
)

NUM_LINES = 40
NUM_OPEN = 2
TENANT = "default"


class Noting(Server):
    """Writes down each line before it is answered."""

    log: int

    async def serve(self, *asked: Any) -> tuple[int, dict[str, Any]]:
        os.write(self.log, b"x\n")
        return await super().serve(*asked)


class Life(WithBatches):
    """A coordinator that keeps itself busy."""

    server_kind = Noting
    folder: Path
    is_draining = False

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        # The same tasks in a thread: a life is shorter than a process takes to start.
        settings = Settings(public(self._config), self._model, os.getpid())
        self._workers = InProcessWorkers(settings)  # type: ignore[assignment]  # what lives use of it

    def _line_server(self, frontend: Frontend, tenants: Tenants) -> LineServer:
        server = super()._line_server(frontend, tenants)
        self.server.log = _appended(self.folder / "asked")  # type: ignore[attr-defined]
        self.making = asyncio.create_task(self._make())
        return server

    async def _make(self) -> None:
        acknowledged = _appended(self.folder / "acked")
        for pause in itertools.repeat(0.005):
            open_ids = await self.jobs.batches.table.open_ids()
            if len(open_ids) < NUM_OPEN and not self.is_draining:
                seed = secrets.randbelow(10**9)
                batch_id = await self._make_one(seed)
                os.write(acknowledged, f"{batch_id} {seed}\n".encode())
            if not open_ids and self.is_draining and not await self._is_left():
                self.stop()
                return
            await asyncio.sleep(pause)

    async def _is_left(self) -> bool:
        batches = self.jobs.batches
        return bool(await batches.table.leftovers()) or any(batches.inputs.folder.iterdir())

    async def _make_one(self, seed: int) -> str:
        files = self.jobs.files
        text = "\n".join(json.dumps(line) for line in batch_lines(seed, NUM_LINES))
        arrived = files.folder / f"{seed}.upload"
        arrived.write_text(text)
        file_id, now = new_file_id(), int(self.clock())
        await files.add(StoredFile(file_id, TENANT, BATCH, "in", len(text), now), arrived)
        asked = BatchRequest(TENANT, "arithmetic", file_id, "/v1/completions", "24h")
        batch = await self.jobs.batches.create(asked)
        await files.delete(TENANT, file_id)
        return batch.batch_id


def _appended(path: Path) -> int:
    return os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY)


async def live(folder: Path, *, is_draining: bool) -> None:
    def on_control(control: str, _url: str) -> None:
        FakeCluster(control, POOLS).start()

    config = config_of(folder, {"jobs": JobLimits(max_crashes=1000)})
    life = Life(config, on_control, lambda _url: None, Owner())
    life.folder, life.is_draining = folder, is_draining
    await life.run()


def _say(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def main() -> None:
    folder = Path(sys.argv[1])
    for command in sys.stdin:
        pid = os.fork()
        if pid == 0:
            asyncio.run(live(folder, is_draining=command.strip() == "drain"))
            os._exit(0)
        _say(pid)
        _, status = os.waitpid(pid, 0)
        _say(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
