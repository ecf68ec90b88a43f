"""What the HTTP routes share: the model that is served, its limits, and the way to an answer.

1. ``body`` takes the bytes of a request in; a route has a text worker read them (text/workers.py).
2. ``Answer`` submits what the worker has made of them and speaks to the caller.
"""

import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request

from coordinator.auth import SCOPE_TENANT, Tenant
from coordinator.cluster.registry import Registry
from coordinator.config import CoordinatorConfig
from coordinator.errors import shutting_down
from coordinator.http.connections.connection import GuardedConnection
from coordinator.http.connections.kept import Connections
from coordinator.http.entry import SCOPE_CLIENT_REQUEST_ID, SCOPE_REQUEST_ID, Door
from coordinator.http.start_report import PoolMemory, StartReport, make_report
from coordinator.http.uploads import Upload, receive_upload
from coordinator.jobs.context import Jobs
from coordinator.jobs.questions.prompts import Opened
from coordinator.jobs.questions.questions import open_document
from coordinator.loop.lag import LoopLag
from coordinator.loop.turns import Turns
from coordinator.node import CoordinatorNode
from coordinator.requests.metrics import RequestMetrics
from coordinator.requests.service import Service
from coordinator.requests.traces import Traces
from coordinator.text.tasks import Fields, ReadFields
from coordinator.text.workers import TextWorkers
from coordinator.validation.bodies import Body, Budget, receive_body
from modeling.checkpoint.config import ModelConfig
from modeling.facts import CheckpointFacts
from modeling.text.parsers.formats import OutputFormat
from modeling.text.tokenizer import Tokenizer
from protocol.errors import RequestError

MAX_SESSION_ID_CHARS = 256
UPLOAD_BYTES = 2 << 20  # of one upload in memory: a piece that is gathered, one that is written
LAG_MEMORY_S = 5.0  # a loop that was late is ready again after so long without being it


@dataclass(frozen=True, slots=True)
class RequestContext:
    """Who sent a request, and its names."""

    tenant: Tenant
    request_id: str
    client_request_id: str
    session_id: str | None
    arrived: float
    priority: int = 0  # of the prefill; 0 is of somebody who waits

    @staticmethod
    def of(request: Request) -> "RequestContext":
        """From the scope that the middleware has filled.

        Raises:
            RequestError: ``X-Session-ID`` is not plain text.
        """
        session_id = request.headers.get("x-session-id")
        if session_id is not None and not (
            0 < len(session_id) <= MAX_SESSION_ID_CHARS and session_id.isprintable()
        ):
            raise RequestError(
                f"X-Session-ID must be 1 to {MAX_SESSION_ID_CHARS} printable characters",
                code="invalid_value",
                param="session_id",
            )
        return RequestContext(
            request.scope[SCOPE_TENANT],
            request.scope[SCOPE_REQUEST_ID],
            request.scope[SCOPE_CLIENT_REQUEST_ID],
            session_id,
            time.monotonic(),
        )


@dataclass(frozen=True, slots=True)
class Frontend:
    """The coordinator as its routes see it."""

    config: CoordinatorConfig
    model: ModelConfig
    node: CoordinatorNode
    tokenizer: Tokenizer  # for single tokens: a text is never encoded here
    format: OutputFormat  # of the model's answers
    workers: TextWorkers
    bodies: Budget
    traces: Traces
    metrics: RequestMetrics
    lag: LoopLag
    turns: Turns
    connections: Connections[GuardedConnection]
    door: Door
    counters: Counter[str]  # hits of failpoints
    started_at: int  # Unix time
    facts: CheckpointFacts
    jobs: Jobs

    @property
    def registry(self) -> Registry:
        return self.node.registry

    @property
    def service(self) -> Service:
        return self.node.service

    @property
    def max_model_len(self) -> int:
        return self.registry.max_model_len(self.config.max_model_len or self.model.max_model_len)

    def report(self) -> StartReport:
        """What is served and how, with the pools that are there."""
        pools = (pool for pool in self.registry.pools.values() if 0 in pool.ranks)
        memory = [PoolMemory.of(pool) for pool in pools]
        return make_report(self.config, self.facts, memory, self.max_model_len)

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[Body]:
        """The body of a request, while the block runs.

        Raises:
            RequestError: there is no room for it, or it did not arrive.
        """
        declared = int(request.headers.get("content-length", "0"))
        tenant = request.scope[SCOPE_TENANT].name
        async with receive_body(request.stream(), declared, self.bodies, tenant) as body:
            yield body

    @asynccontextmanager
    async def upload(self, request: Request, folder: Path) -> AsyncIterator[Upload]:
        """The file that a form brings, in ``folder`` while the block runs, on the disk.

        Raises:
            RequestError: there is no room for it, or it is no form with one file.
        """
        tenant, began = request.scope[SCOPE_TENANT].name, time.monotonic()
        limits, min_free_bytes = self.config.limits, self.jobs.min_free_bytes
        self.bodies.take(tenant, UPLOAD_BYTES)
        try:
            async with receive_upload(request, folder, limits, min_free_bytes) as upload:
                yield upload
        finally:
            self.bodies.give_back(tenant, UPLOAD_BYTES, time.monotonic() - began)

    async def fields(self, request: Request) -> dict[str, Any]:
        """The fields of a body that is JSON.

        Raises:
            RequestError: it is none.
        """
        async with self.body(request) as body:
            found = await self.workers.run(request.scope[SCOPE_TENANT].name, ReadFields(), body)
        assert isinstance(found, Fields), found
        fields: dict[str, Any] = msgspec.msgpack.decode(found.fields)
        return fields

    def check_ready(self) -> None:
        """Raises RequestError until every pool has served once."""
        if not self.node.is_complete:
            raise RequestError("the cluster is starting", code="starting", status=503)

    def unready(self, now: float) -> RequestError | None:
        """Why new work had better go elsewhere; what comes nevertheless is served if it can be."""
        if self.door.is_closed:
            return shutting_down()
        if not self.node.is_complete or not self.registry.serving("decode"):
            return RequestError(self.registry.missing(), code="starting", status=503)
        lag_s = self.lag.largest(now, LAG_MEMORY_S)
        if lag_s > self.config.max_loop_lag_s:
            return RequestError(
                f"the coordinator is overloaded: its event loop was {lag_s:.1f} s late",
                code="overloaded",
                status=503,
            )
        return None

    async def open_document(
        self, tenant: Tenant, document_id: str, form: str, param: str
    ) -> Opened:
        """A document that a request names.

        Raises:
            RequestError: it cannot be used so.
        """
        return await open_document(self.jobs.documents, tenant.name, document_id, form, param)
