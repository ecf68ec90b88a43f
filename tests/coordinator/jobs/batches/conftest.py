"""A whole coordinator in this process with files and batches, on the fake cluster."""

import asyncio
import contextlib
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
from coordinator.auth import Tenants
from coordinator.config import BatchLimits, CoordinatorConfig, ExpectedPool, Limits
from coordinator.connection import guarded
from coordinator.control import ControlPlane, Owner
from coordinator.frontend import Frontend
from coordinator.jobs.database import Database
from coordinator.jobs.files import SCHEMA as FILE_SCHEMA
from coordinator.jobs.files import Files
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


class WithFiles(Coordinator):
    """A coordinator that offers files in ``folder``."""

    folder: Path
    clock: Callable[[], float] = time.time

    def _http_server(
        self, control: ControlPlane, registry: Registry, service: Service, *_others: Any
    ) -> Any:
        config = self._config
        self.database = Database(self.folder / "jobs.sqlite", FILE_SCHEMA)
        self.files = Files(self.database, self.folder / "files", config.batches, self.clock)
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
        )
        app = build_app(frontend, Tenants(config.api_keys, "secret"))
        server = uvicorn.Server(
            uvicorn.Config(
                app, http=guarded(config.limits), ws="none", lifespan="off", log_config=None
            )
        )
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
        return server

    async def run(self) -> None:
        try:
            await super().run()
        finally:
            self.database.close()


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
        self.coordinator = WithFiles(self._config, self._on_control, self._on_ready, Owner())
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
