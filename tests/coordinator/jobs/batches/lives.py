"""Lives of a coordinator that makes batches and works on them, each a process of its own.

Started with a folder; then for each line on standard input: ``live`` begins a life and prints its
process id, ``MADE`` for each batch, and its exit code; then the next line is read. ``drain`` is a
life that makes nothing new, and ends when everything is done. Everything is imported once: a life
is a fork.
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
from coordinator.config import public
from coordinator.control import Owner
from coordinator.http.frontend import Frontend
from coordinator.http.line_server import LineServer
from coordinator.jobs.batches.batches import BatchRequest
from coordinator.jobs.files.files import BATCH, StoredFile, new_file_id
from coordinator.text.tasks import Settings
from coordinator.validation.bodies import Body
from tests.campaign.jobs.asked import batch_lines
from tests.coordinator.conftest import FakeCluster
from tests.coordinator.in_process import InProcessWorkers
from tests.coordinator.jobs.simulated_ingestor import SimulatedIngestor
from tests.coordinator.jobs.world import BLOCK_SIZE, FINGERPRINT, POOLS, Observed, Server, config_of

NUM_LINES = 40
NUM_OPEN = 2
MADE = 1  # said when a batch is acknowledged
TENANT = "default"


class Noting(Server):
    """Writes down each line before it is answered."""

    log: int

    async def serve(
        self, tenant: str, url: str, body: Body, request_id: str
    ) -> tuple[int, dict[str, Any]]:
        os.write(self.log, b"x\n")
        return await super().serve(tenant, url, body, request_id)


class Life(Observed):
    """A coordinator that keeps itself busy."""

    folder: Path
    is_draining = False

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        # The same tasks in a thread: a life is shorter than a process takes to start.
        settings = Settings(public(self._config), self._model, os.getpid())
        self._workers = InProcessWorkers(settings)  # type: ignore[assignment]  # what lives use of it

    def _line_server(self, frontend: Frontend, tenants: Tenants) -> LineServer:
        server = Noting(frontend, tenants)
        server.log = _appended(self.folder / "asked")
        self.making = asyncio.create_task(self._make())
        return server

    async def _make(self) -> None:
        acknowledged = _appended(self.folder / "acked")
        table = self.jobs.batches.table
        await self.jobs.recovered.wait()
        for pause in itertools.repeat(0.005):
            pending = await table.in_states(table.of.PENDING)
            if len(pending) < NUM_OPEN and not self.is_draining:
                seed = secrets.randbelow(10**9)
                batch_id = await self._make_one(seed)
                os.write(acknowledged, f"{batch_id} {seed}\n".encode())
                _say(MADE)
            if self.is_draining and not pending and not await table.cleanups():
                self.stop()
                return
            await asyncio.sleep(pause)

    async def _make_one(self, seed: int) -> str:
        files = self.jobs.files
        text = "\n".join(json.dumps(line) for line in batch_lines(seed, NUM_LINES))
        arrived = files.path(f"{seed}.upload")
        arrived.write_text(text)
        file_id, now = new_file_id(), int(self.clock())
        await files.add(StoredFile(file_id, TENANT, BATCH, "in", len(text), now), arrived)
        batch = await self.jobs.batches.create(
            BatchRequest(
                tenant=TENANT,
                model="arithmetic",
                input_file_id=file_id,
                endpoint="/v1/completions",
                completion_window="24h",
            )
        )
        await files.delete(TENANT, file_id)
        return batch.id


def _appended(path: Path) -> int:
    return os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY)


async def live(folder: Path, *, is_draining: bool) -> None:
    def on_control(control: str, _url: str) -> None:
        FakeCluster(control, POOLS).start()

    config = config_of(folder, data_dir=str(folder), jobs={"max_crashes": 1000})
    ingestor = SimulatedIngestor(BLOCK_SIZE, FINGERPRINT, folder=folder)
    life = Life(config, on_control, lambda _url: None, Owner(), ingestor)
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
