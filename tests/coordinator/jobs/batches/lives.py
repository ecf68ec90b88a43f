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
import time
from pathlib import Path
from typing import Any

from coordinator.auth import Tenants
from coordinator.config import public
from coordinator.control import Owner
from coordinator.http.frontend import Frontend
from coordinator.jobs.batches.batches import BatchRequest
from coordinator.jobs.files.files import BATCH, StoredFile, new_file_id
from coordinator.server import Coordinator, Parts
from coordinator.text.tasks import Settings
from coordinator.validation.bodies import Body
from modeling.checkpoint.config import load_config
from tests.campaign.jobs.asked import batch_lines
from tests.coordinator.conftest import FakeCluster
from tests.coordinator.in_process import InProcessWorkers
from tests.coordinator.jobs.simulated_ingestor import SimulatedIngestor
from tests.coordinator.jobs.world import BLOCK_SIZE, FINGERPRINT, POOLS, Server, config_of

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


class Life:
    """A coordinator that keeps itself busy."""

    def __init__(self, folder: Path, *, is_draining: bool) -> None:
        self._folder = folder
        self._is_draining = is_draining
        config = config_of(folder, data_dir=str(folder), jobs={"max_crashes": 1000})
        # The text worker's tasks in a thread: a life is shorter than a process takes to start.
        settings = Settings(public(config), load_config(config.model), os.getpid())
        parts = Parts(
            ingestor=SimulatedIngestor(BLOCK_SIZE, FINGERPRINT, folder=folder),
            workers=InProcessWorkers(settings),  # type: ignore[arg-type]  # what lives use of it
            make_lines=self._make_lines,
        )
        self.coordinator = Coordinator(config, self._on_control, lambda _url: None, Owner(), parts)

    def _on_control(self, control: str, _url: str) -> None:
        FakeCluster(control, POOLS).start()

    def _make_lines(self, frontend: Frontend, tenants: Tenants) -> Noting:
        server = Noting(frontend, tenants)
        server.log = _appended(self._folder / "asked")
        self.making = asyncio.create_task(self._make())
        return server

    async def _make(self) -> None:
        acknowledged = _appended(self._folder / "acked")
        jobs = self.coordinator.jobs
        table = jobs.batches.table
        await jobs.recovered.wait()
        for pause in itertools.repeat(0.005):
            pending = await table.in_states(table.of.PENDING)
            if len(pending) < NUM_OPEN and not self._is_draining:
                seed = secrets.randbelow(10**9)
                batch_id = await self._make_one(seed)
                os.write(acknowledged, f"{batch_id} {seed}\n".encode())
                _say(MADE)
            if self._is_draining and not pending and not await table.cleanups():
                self.coordinator.stop()
                return
            await asyncio.sleep(pause)

    async def _make_one(self, seed: int) -> str:
        files = self.coordinator.jobs.files
        text = "\n".join(json.dumps(line) for line in batch_lines(seed, NUM_LINES))
        arrived = files.path(f"{seed}.upload")
        arrived.write_text(text)
        file_id, now = new_file_id(), int(time.time())
        await files.add(StoredFile(file_id, TENANT, BATCH, "in", len(text), now), arrived)
        batch = await self.coordinator.jobs.batches.create(
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
    await Life(folder, is_draining=is_draining).coordinator.run()


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
