"""A coordinator with files and batches, and what stands beside it in their tests."""

import asyncio
import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.auth import Tenant, Tenants
from coordinator.cluster.registry import Registry
from coordinator.config import BatchLimits, CoordinatorConfig, ExpectedPool, Limits
from coordinator.http.frontend import Frontend
from coordinator.http.line_server import LineServer
from coordinator.jobs.batches.input import request_of
from coordinator.jobs.context import JobDependencies, Jobs
from coordinator.jobs.documents.ingestor import Ingestor
from coordinator.node import CoordinatorNode
from coordinator.server import Coordinator
from coordinator.validation.bodies import Body

BLOCK_SIZE = 16
POOLS = (("prefill0", "prefill", 2, 1), ("decode0", "decode", 1, 1))


@dataclass
class Clock:
    """Unix time, which a test moves on."""

    offset_s: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.offset_s


def fields_of(body: Body) -> dict[str, Any]:
    """The request of a line, as a text worker reads it."""
    assert body.file is not None and body.line is not None, "it is a line"
    return request_of(os.pread(body.file, body.length, body.offset), body.line, Limits())


class Library:
    """Makes documents for lines: each once, ready when ``gate`` is open."""

    def __init__(self) -> None:
        self.made: dict[str, dict[str, Any]] = {}
        self.gate = asyncio.Event()
        self.gate.set()

    async def create(self, tenant: Tenant, body: Body) -> dict[str, Any]:
        fields = fields_of(body)
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
        self.asked.append(fields_of(asked[2]))
        return self.failures.pop() if self.failures else await super().serve(*asked)


class WithBatches(Coordinator):
    """A coordinator whose clock and lines a test can get at."""

    server_kind = Server
    clock: Callable[[], float] = time.time
    jobs: Jobs

    def _dependencies(self, registry: Registry, ingestor: Ingestor) -> JobDependencies:
        return dataclasses.replace(super()._dependencies(registry, ingestor), clock=self.clock)

    def _jobs(self, node: CoordinatorNode) -> Jobs:
        self.jobs = super()._jobs(node)
        return self.jobs

    def _line_server(self, frontend: Frontend, tenants: Tenants) -> LineServer:
        self.library = Library()
        self.server = self.server_kind(frontend, tenants, self.library.create)
        return self.server


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
        data_dir=str(folder),
        log_level="WARNING",
        limits=Limits(**fields.pop("limits", {})),
        batches=BatchLimits(**batches),
        **fields,
    )
