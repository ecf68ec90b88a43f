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

from coordinator.config import CoordinatorConfig
from coordinator.control import Owner
from tests.coordinator.jobs.batches.composition import POOLS, Clock, WithBatches, config_of

DEADLINE_S = 20.0


class Running(threading.Thread):
    """A coordinator in a thread; ``do`` runs something in its event loop."""

    def __init__(self, config: CoordinatorConfig, fakes: Any, clock: Clock) -> None:
        super().__init__(daemon=True)
        self.url = ""
        self.failure: BaseException | None = None
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


@pytest.fixture(scope="session")
def start_batches(helpers: Any) -> Any:
    """The function that runs a coordinator with files and batches until its block ends."""

    @contextlib.contextmanager
    def start(folder: Path, **fields: Any) -> Iterator[Site]:
        clock = Clock()
        config = config_of(folder, fields)
        running = Running(config, helpers.FakeCluster, clock)
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
