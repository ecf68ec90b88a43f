"""A whole coordinator in this process with files and batches, on the fake cluster."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from coordinator.api import build_app
from coordinator.auth import Tenant, Tenants
from coordinator.config import BatchLimits, CoordinatorConfig, ExpectedPool, Limits
from coordinator.connection import guarded
from coordinator.control import ControlPlane, Owner
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

DEADLINE_S = 20.0
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
        self.server = Server(frontend, tenants, self.library.create)
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


class Running(threading.Thread):
    """A coordinator in a thread; ``do`` runs something in its event loop."""

    def __init__(self, folder: Path, config: CoordinatorConfig, fakes: Any, clock: Clock) -> None:
        super().__init__(daemon=True)
        self.url = ""
        self.failure: BaseException | None = None
        self._folder = folder
        self._clock = clock
        self._config = config
        self._fakes = fakes
        self._is_ready = threading.Event()

    def run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self.failure = error
            self._is_ready.set()
            raise

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.coordinator = WithBatches(self._config, self._on_control, self._on_ready, Owner())
        self.coordinator.folder = self._folder
        self.coordinator.clock = self._clock
        await self.coordinator.run()

    def _on_control(self, control: str, _url: str) -> None:
        self.fake = self._fakes(control, POOLS)
        self.fake.start()

    def _on_ready(self, url: str) -> None:
        self.url = url
        self._is_ready.set()

    def begin(self) -> None:
        self.start()
        assert self._is_ready.wait(DEADLINE_S), "not ready"
        assert self.failure is None, self.failure

    def do(self, work: Callable[[], Any]) -> Any:
        """In the coordinator's loop; returns what an awaitable ``work`` makes."""

        async def call() -> Any:
            value = work()
            return await value if asyncio.iscoroutine(value) else value

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(DEADLINE_S)

    def stop(self) -> None:
        if self.is_alive():
            self.loop.call_soon_threadsafe(self.coordinator.stop)
        self.join(DEADLINE_S)
        self.fake.stop()
        assert not self.is_alive()


@dataclass
class Site:
    """Clients of a running coordinator, and what lies on its disk."""

    running: Running
    folder: Path
    http: httpx.Client
    openai: openai.OpenAI
    clock: Clock = field(default_factory=Clock)

    def stored(self) -> list[str]:
        """Names in the folder of files."""
        return sorted(path.name for path in (self.folder / "files").iterdir())

    @property
    def coordinator(self) -> WithBatches:
        return self.running.coordinator

    def batch(self, *lines: Any, endpoint: str = "/v1/completions", **fields: Any) -> Any:
        """A new batch of lines: objects, or texts as they are."""
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        file = self.openai.files.create(file=("in.jsonl", text.encode()), purpose="batch")
        return self.openai.batches.create(
            input_file_id=file.id,
            endpoint=endpoint,  # type: ignore[arg-type]
            completion_window="24h",
            **fields,
        )

    def wait(self, batch_id: str, *statuses: str) -> Any:
        """The batch when it has ended, in one of these states; else completed."""
        ends = ("completed", "failed", "expired", "cancelled")

        def ended() -> Any:
            batch = self.openai.batches.retrieve(batch_id)
            return batch if batch.status in ends else None

        batch = self.until(ended, f"{batch_id} ends")
        assert batch.status in (statuses or ("completed",)), batch
        return batch

    def results(self, batch: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """What lies in its output file and its error file."""
        return self.read(batch.output_file_id), self.read(batch.error_file_id)

    def read(self, file_id: str | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        text = self.openai.files.content(file_id).text
        return [json.loads(line) for line in text.splitlines()]

    def until(self, condition: Callable[[], Any], what: str = "") -> Any:
        """Ask again and again until something is so."""
        deadline, pause = time.monotonic() + DEADLINE_S, threading.Event()
        while not (value := condition()):
            assert time.monotonic() < deadline, f"never happened: {what}"
            pause.wait(0.01)
        return value


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


@pytest.fixture(scope="session")
def start_batches(helpers: Any) -> Any:
    """The function that runs a coordinator with files and batches until its block ends."""

    @contextlib.contextmanager
    def start(folder: Path, **fields: Any) -> Iterator[Site]:
        clock = Clock()
        config = config_of(folder, fields)
        running = Running(folder, config, helpers.FakeCluster, clock)
        running.begin()
        key = config.api_keys[0] if config.api_keys else "none"
        headers = {"authorization": f"Bearer {key}"}
        try:
            with (
                httpx.Client(base_url=running.url, timeout=DEADLINE_S, headers=headers) as http,
                openai.OpenAI(
                    base_url=f"{running.url}/v1", api_key=key, max_retries=0, timeout=DEADLINE_S
                ) as client,
            ):
                yield Site(running, folder, http, client, clock)
        finally:
            running.stop()

    return start


@pytest.fixture(scope="session")
def shared_batches(start_batches: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One coordinator for all tests that leave it as they found it."""
    limits = {"max_upload_bytes": 4 << 20, "body_idle_timeout_s": 1.0}
    with start_batches(tmp_path_factory.mktemp("batches"), limits=limits) as site:
        yield site


@pytest.fixture
def site(shared_batches: Site) -> Site:
    return shared_batches
