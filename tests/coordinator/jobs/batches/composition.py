"""What a coordinator with files and batches is put together from, until its own server does it."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from coordinator.api import build_app
from coordinator.auth import Tenant, Tenants
from coordinator.config import BatchLimits, CoordinatorConfig, ExpectedPool, Limits
from coordinator.connection import guarded
from coordinator.control import ControlPlane
from coordinator.frontend import Frontend
from coordinator.jobs.batch_input import Inputs
from coordinator.jobs.batch_runner import BatchRunner
from coordinator.jobs.batch_table import SCHEMA as BATCH_SCHEMA
from coordinator.jobs.batch_table import BatchTable
from coordinator.jobs.batches import Batches
from coordinator.jobs.database import Database
from coordinator.jobs.files import SCHEMA as FILE_SCHEMA
from coordinator.jobs.files import Files
from coordinator.line_server import LineServer
from coordinator.registry import Registry
from coordinator.server import Coordinator
from coordinator.service import Service
from coordinator.traces import Traces

BLOCK_SIZE = 16
POOLS = (("prefill0", "prefill", 2, 1), ("decode0", "decode", 1, 1))


@dataclass
class Clock:
    """Unix time, which a test moves on."""

    offset_s: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.offset_s


class Library:
    """Makes documents for lines: each once, ready when ``gate`` is open."""

    def __init__(self) -> None:
        self.made: dict[str, dict[str, Any]] = {}
        self.gate = asyncio.Event()
        self.gate.set()

    async def create(self, tenant: Tenant, fields: dict[str, Any]) -> dict[str, Any]:
        document = self.made.setdefault(
            fields["idempotency_key"],
            {"id": f"doc_{len(self.made)}", "object": "document", "tenant": tenant.name},
        )
        await self.gate.wait()
        if fields["source"].get("text") == "bug":
            raise LookupError("a bug")
        has_failed = fields["source"].get("text") == "bad"
        error = {"code": "unprocessable_document", "message": "it is bad"} if has_failed else None
        return {**document, "status": "failed" if error else "ready", "error": error}


class Server(LineServer):
    """Notes which lines it was asked for; fails as a test has told it."""

    def __init__(self, *collaborators: Any) -> None:
        super().__init__(*collaborators)
        self.asked: list[dict[str, Any]] = []
        self.failures: list[tuple[int, dict[str, Any]]] = []

    async def serve(self, *asked: Any) -> tuple[int, dict[str, Any]]:
        self.asked.append(asked[2])
        return self.failures.pop() if self.failures else await super().serve(*asked)


class WithBatches(Coordinator):
    """A coordinator that offers files and batches, in ``folder``."""

    server_kind = Server
    folder: Path
    clock: Callable[[], float] = time.time

    def _http_server(
        self, control: ControlPlane, registry: Registry, service: Service, *_others: Any
    ) -> Any:
        config, limits = self._config, self._config.batches
        self.database = Database(self.folder / "jobs.sqlite", FILE_SCHEMA + BATCH_SCHEMA)
        self.files = Files(self.database, self.folder / "files", limits, self.clock)
        inputs = Inputs(self.folder / "batches", limits, config.limits)
        table = BatchTable(self.database, self.clock)
        self.batches = Batches(table, self.files, inputs, limits)
        frontend = Frontend(
            config=config,
            model=self._model,
            registry=registry,
            control=control,
            service=service,
            tokenization=self._tokenization,
            traces=Traces(),
            started_at=int(time.time()),
            files=self.files,
            batches=self.batches,
        )
        self.service = service
        tenants = Tenants(config.api_keys, "secret")
        self.library = Library()
        self.server = self.server_kind(frontend, tenants, self.library.create)
        self.runner = BatchRunner(self.batches, self.server)
        self.work = asyncio.create_task(self._run_batches())
        app = build_app(frontend, tenants)
        server = uvicorn.Server(
            uvicorn.Config(
                app, http=guarded(config.limits), ws="none", lifespan="off", log_config=None
            )
        )
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
        return server

    async def _run_batches(self) -> None:
        await self.files.recover()
        await self.runner.run()

    async def run(self) -> None:
        try:
            await super().run()
        finally:
            self.work.cancel()
            await asyncio.wait({self.work})
            self.database.close()
            if not self.work.cancelled():
                self.work.result()


def config_of(folder: Path, fields: dict[str, Any]) -> CoordinatorConfig:
    batches = {"min_free_bytes": 1, "retry_s": 0.01, **fields.pop("batches", {})}
    return CoordinatorConfig(
        token="secret-token",
        model="arithmetic",
        pools=tuple(ExpectedPool(*pool) for pool in POOLS),
        control_listen=f"ipc://{folder}/c",
        port=0,
        block_size=BLOCK_SIZE,
        max_model_len=4096,
        log_level="WARNING",
        limits=Limits(**fields.pop("limits", {})),
        batches=BatchLimits(**batches),
        **fields,
    )
