"""The coordinator process from its first socket to its last: everything in one event loop.

1. The HTTP socket is bound first, so that a taken port is one line; then the control socket.
2. ``on_control`` is told both addresses: only now can ranks be started.
3. HTTP answers at once, with 503 until every expected pool serves; then ``on_ready``. After a
   restart, until one decode pool does.
4. A rank that is refused, or a start that takes too long, ends it with :class:`StartFailed`.
5. Pools that are lost and serve again are told to the owner; nothing of it ends the process.
6. ``stop``: nothing new is accepted, what runs may end within ``shutdown_grace_s``; then streams
   end with an error event, every rank is told to end; jobs go on with the next coordinator.
7. A coordinator that finds itself replaced does nothing of that: what it put away would be its
   successor's. Its owner has to end the process.
"""

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from coordinator.auth import Tenants
from coordinator.config import CoordinatorConfig, public
from coordinator.control import ControlPlane, Outlet, Owner, StartFailed
from coordinator.faulty import FaultyOutlet
from coordinator.http.api import build_app
from coordinator.http.connections.connection import GuardedConnection
from coordinator.http.connections.kept import Connections, max_connections
from coordinator.http.connections.serving import HttpServer, bind_http, http_url
from coordinator.http.entry import Door
from coordinator.http.frontend import Frontend
from coordinator.http.line_server import LineServer
from coordinator.jobs.context import JobDependencies, Jobs
from coordinator.jobs.documents.ingestor import Ingestor
from coordinator.jobs.documents.tiering import Tiering
from coordinator.key_file import KeyFile
from coordinator.loop.core_wait import CoreWait
from coordinator.loop.garbage import collect_in_quiet
from coordinator.loop.lag import INTERVAL_S, LoopLag
from coordinator.loop.slices import Slices
from coordinator.loop.turns import Turns
from coordinator.node import CoordinatorNode
from coordinator.requests.metrics import RequestMetrics
from coordinator.requests.service import Ports
from coordinator.requests.traces import Traces
from coordinator.text.tasks import Settings
from coordinator.text.tokenizing import load_tools, read_model
from coordinator.text.workers import TextWorkers
from coordinator.validation.bodies import Budget
from protocol.process.limits import max_open_files
from protocol.sockets import AsyncRouter, open_async_context

STOP_BUDGET_S = 2.0


@dataclass(frozen=True, slots=True)
class Parts:
    """What a coordinator works with. Whoever runs one may bring another than its own.

    Attributes:
        ingestor: computes and keeps documents; None lets the pools and the store do it.
        workers: read what callers send; None starts processes.
        make_lines: makes what answers the lines of batches.
        clock: Unix time, as callers see it.
    """

    ingestor: Ingestor | None = None
    workers: TextWorkers | None = None
    make_lines: Callable[[Frontend, Tenants], LineServer] = LineServer
    clock: Callable[[], float] = time.time


class Coordinator:
    """The whole coordinator. Create it in its event loop, then ``run``. ``frontend`` and ``jobs``
    are there once it runs.

    Args:
        config: checked.
        on_control: called with (control address, HTTP URL) once both are bound.
        on_ready: called with the HTTP URL once the cluster answers.
        owner: told what happens to the pools, and when another coordinator has taken over.
        parts: see there.

    Raises:
        ConfigError: a model or tokenizer that cannot be read, an address that is taken.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        on_control: Callable[[str, str], None],
        on_ready: Callable[[str], None],
        owner: Owner,
        parts: Parts = Parts(),
    ) -> None:
        self._config = config
        self._parts = parts
        self._on_control = on_control
        self._on_ready = on_ready
        self.frontend: Frontend
        self.jobs: Jobs
        self._owner = owner
        self._stop, self._stop_now = asyncio.Event(), asyncio.Event()
        self._door = Door()
        self._counters: Counter[str] = Counter()  # hits of failpoints
        self._lag = LoopLag()
        tools = load_tools(config)  # and the template compiles
        self._tokenizer, self._text, self._format = tools.tokenizer, tools.identity, tools.format
        self._model, self._facts = read_model(config, tools)
        settings = Settings(public(config), self._model, os.getpid(), self._text)
        self._tenants = Tenants(config.api_keys, config.secret or config.token)
        places = config.limits.max_requests, self._max_waiting_of_one
        self._workers = parts.workers or TextWorkers(settings, config.num_text_workers, places)
        self._key_file: KeyFile | None = None
        if config.api_key_file:
            self._key_file = KeyFile(Path(config.api_key_file), config.api_keys, self._tenants)
            self._key_file.load()
        self._socket = bind_http(config.host, config.port)
        self.url = http_url(config.host, self._socket)

    def stop(self, *, at_once: bool = False) -> None:
        """End ``run`` when what runs has ended, or at once. Call it in the event loop."""
        self._stop.set()
        if at_once:
            self._stop_now.set()

    async def run(self) -> None:
        """Serve until ``stop``.

        Raises:
            StartFailed: see the module's docstring.
        """
        async with self._control() as (control, router):
            slices, traces, metrics = Slices(), Traces(), RequestMetrics()
            node = CoordinatorNode(
                self._config,
                self._model.fingerprint,
                epoch=self._config.epoch or time.time_ns() // 1_000_000,
                ports=Ports(
                    spread=slices.add,
                    observed=self._lag.observed,
                    num_tenants=partial(len, self._tenants),
                    on_ended=metrics.observe,
                    on_gone=traces.close,
                ),
                wake=control.wake,
            )
            self.jobs = jobs = self._make_jobs(node)
            http = self._http_server(node, jobs, traces, metrics)
            failure: StartFailed | None = None
            self._workers.start()
            await jobs.start()
            async with asyncio.TaskGroup() as tasks:
                watching = [
                    tasks.create_task(jobs.watch()),
                    tasks.create_task(self._watch_keys()),
                    tasks.create_task(self._measure_lag()),
                    tasks.create_task(collect_in_quiet(partial(_num_at_work, node, http))),
                ]
                serving = tasks.create_task(http.serve(sockets=[self._socket]))
                plane = tasks.create_task(control.run(node))
                slicing = tasks.create_task(slices.run())
                self._on_control(router.address, self.url)
                try:
                    await self._wait_ready(control, node)
                    await self._stop.wait()
                    await self._drain(jobs, watching[0])
                except StartFailed as error:
                    failure = error  # raised when everything has been put away
                finally:
                    for task in watching:
                        task.cancel()
                    await self._workers.close()
                    await jobs.stop()
                    node.service.shut_down(time.monotonic())
                    await slices.settled()
                    slicing.cancel()
                    http.should_exit = True
                    plane.cancel()
                    await control.shut_down(node, "the coordinator ends")
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(asyncio.shield(serving), STOP_BUDGET_S)
                    serving.cancel()
                    await jobs.close()
            if failure is not None:
                raise failure

    async def _drain(self, jobs: Jobs, watching: asyncio.Task[None]) -> None:
        self._door.close()
        watching.cancel()
        await jobs.stop()
        await self._door.drained(self._config.shutdown_grace_s, self._stop_now)

    def _max_waiting_of_one(self) -> int:
        """Requests of one tenant that may wait to be read: as many as may be served."""
        return self._config.limits.tenant_requests(len(self._tenants))

    async def _measure_lag(self) -> None:
        with contextlib.closing(CoreWait()) as core:
            while True:
                self._lag.fired(time.monotonic(), core.waited_s())
                await asyncio.sleep(INTERVAL_S)

    async def _watch_keys(self) -> None:
        if self._key_file is not None:
            await self._key_file.watch()

    @asynccontextmanager
    async def _control(self) -> AsyncIterator[tuple[ControlPlane, AsyncRouter]]:
        try:
            with open_async_context(self._config.token) as context:
                router = AsyncRouter(context, self._config.control_listen)
                try:
                    yield ControlPlane(router, self._outlet(router), self._owner), router
                finally:
                    # Linger is zero: give the last frames a moment to leave before the socket goes.
                    await asyncio.sleep(0.05)
                    router.close()
        finally:
            self._socket.close()

    def _outlet(self, router: AsyncRouter) -> Outlet:
        if not self._config.failpoints:
            return Outlet(router)
        return FaultyOutlet(router, self._config.failpoints, self._counters)

    def _make_jobs(self, node: CoordinatorNode) -> Jobs:
        limit = self._config.max_model_len or self._model.max_model_len
        return Jobs(
            JobDependencies(
                config=self._config,
                model=self._model,
                text=self._text,
                workers=self._workers,
                ingestor=self._parts.ingestor or Tiering(self._config, node, time.monotonic),
                max_model_len=partial(node.registry.max_model_len, limit),
                clock=self._parts.clock,
                counters=self._counters,
            )
        )

    def _http_server(
        self, node: CoordinatorNode, jobs: Jobs, traces: Traces, metrics: RequestMetrics
    ) -> HttpServer:
        limits, turns = self._config.limits, Turns()
        connections: Connections[GuardedConnection] = Connections(
            max_connections(limits.max_connections, max_open_files())
        )
        self.frontend = frontend = Frontend(
            config=self._config,
            model=self._model,
            node=node,
            counters=self._counters,
            tokenizer=self._tokenizer,
            format=self._format,
            workers=self._workers,
            bodies=Budget(limits, partial(len, self._tenants)),
            traces=traces,
            metrics=metrics,
            lag=self._lag,
            door=self._door,
            started_at=int(time.time()),
            facts=self._facts,
            jobs=jobs,
            turns=turns,
            connections=connections,
        )
        jobs.attach(self._parts.make_lines(frontend, self._tenants))
        app = build_app(frontend, self._tenants)
        return HttpServer(app, limits, connections, turns)

    async def _wait_ready(self, control: ControlPlane, node: CoordinatorNode) -> None:
        stopping = asyncio.create_task(self._stop.wait())
        timeout_s = None if self._config.is_restart else self._config.ready_timeout_s
        waiting: set[asyncio.Future[Any]] = {control.started, stopping}
        done, _ = await asyncio.wait(
            waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        stopping.cancel()
        if control.started in done:
            control.started.result()
            self._on_ready(self.url)
        elif not done:
            raise StartFailed(f"not ready after {timeout_s:.0f} s: {node.registry.missing()}")


def _num_at_work(node: CoordinatorNode, http: HttpServer) -> int:
    """Requests, or answers that are still being sent."""
    return max(node.service.loads.num_active, http.connections.num_at_work)
