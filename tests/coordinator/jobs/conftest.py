"""A whole coordinator in this process, with the fake cluster and the simulated ingestor."""

import asyncio
import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.config import CoordinatorConfig, ExpectedPool, JobLimits
from coordinator.control import Owner
from coordinator.jobs.context import Jobs
from coordinator.jobs.documents.ingestor import SimulatedIngestor
from coordinator.node import CoordinatorNode
from coordinator.server import Coordinator
from kvcache.prefix import block_salt, hash_blocks
from modeling.checkpoint.config import load_config
from protocol.messages import CacheUpdate

DEADLINE_S = 20.0
BLOCK_SIZE = 16
POOLS = (("prefill0", "prefill", 2, 1), ("decode0", "decode", 1, 1))
FINGERPRINT = load_config("arithmetic").fingerprint


class FakeIngestor(SimulatedIngestor):
    """What it stores, the fake cluster's decode pool has cached."""

    fake: Any = None

    def _store(self, block_hashes: Sequence[bytes]) -> None:
        super()._store(block_hashes)
        hashes = tuple(block_hashes)

        def tell() -> None:
            self.fake.cache["decode0"].update(hashes)
            self.fake.say("decode0", CacheUpdate(stored=hashes))

        if self.fake is not None:
            self.fake.do(tell)


class _Coordinator(Coordinator):
    """As it is, but for the disk space that is kept free."""

    min_free_bytes = 0
    jobs: Jobs | None = None

    def _jobs(self, node: CoordinatorNode) -> Jobs:
        assert self._ingestor is not None
        surroundings = dataclasses.replace(
            self._dependencies(node.registry, self._ingestor), min_free_bytes=self.min_free_bytes
        )
        self.jobs = Jobs(surroundings)
        return self.jobs


class Running(threading.Thread):
    """A coordinator in a thread; ``do`` runs something in its event loop."""

    def __init__(
        self,
        config: CoordinatorConfig,
        ingestor: FakeIngestor,
        fakes: Any,
        min_free_bytes: int,
    ) -> None:
        super().__init__(daemon=True)
        self._min_free_bytes = min_free_bytes
        self.ingestor = ingestor
        self.url = ""
        self.failure: BaseException | None = None
        self._config = config
        self._fakes = fakes
        self._is_ready = threading.Event()

    def run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # shown by ``__enter__`` or ``stop``
            self.failure = error
            self._is_ready.set()
            raise

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.coordinator = _Coordinator(
            self._config, self._on_control, self._on_ready, Owner(), self.ingestor
        )
        self.coordinator.min_free_bytes = self._min_free_bytes
        await self.coordinator.run()

    @property
    def jobs(self) -> Jobs:
        assert self.coordinator.jobs is not None
        return self.coordinator.jobs

    def _on_control(self, control: str, _url: str) -> None:
        self.fake = self._fakes(control, POOLS)
        self.fake.config = load_config(self._config.model)
        self.fake.block_size = self._config.block_size
        self.ingestor.fake = self.fake
        self.fake.start()

    def _on_ready(self, url: str) -> None:
        self.url = url
        self._is_ready.set()

    def do(self, work: Callable[[], Any]) -> None:
        """In the coordinator's loop; returns when it is done."""
        done = threading.Event()

        def run() -> None:
            work()
            done.set()

        self.loop.call_soon_threadsafe(run)
        assert done.wait(DEADLINE_S)

    def begin(self) -> None:
        self.start()
        assert self._is_ready.wait(DEADLINE_S), "not ready"
        assert self.failure is None, self.failure

    def stop(self) -> None:
        if self.is_alive():
            self.loop.call_soon_threadsafe(self.coordinator.stop)
        self.join(DEADLINE_S)
        self.fake.stop()
        assert not self.is_alive()


@dataclass
class Site:
    """A client of a running coordinator, and what a test does with documents."""

    running: Running
    client: httpx.Client

    @property
    def ingestor(self) -> FakeIngestor:
        return self.running.ingestor

    def post(self, path: str = "", **fields: Any) -> httpx.Response:
        return self.client.post(f"/v1/documents{path}", json=fields)

    def ingest(self, **source: Any) -> dict[str, Any]:
        """A new document from ``text=...`` and so on."""
        reply = self.post(source=source)
        assert reply.status_code == 202, reply.text
        made: dict[str, Any] = reply.json()
        return made

    def get(self, document_id: str, **query: Any) -> dict[str, Any]:
        reply = self.client.get(f"/v1/documents/{document_id}", params=query)
        assert reply.status_code == 200, reply.text
        found: dict[str, Any] = reply.json()
        return found

    def wait(self, document_id: str, status: str = "ready") -> dict[str, Any]:
        """The document when nothing more is done for it."""
        found = self.get(document_id, wait=DEADLINE_S)
        assert found["status"] == status, found
        return found

    def until(self, condition: Callable[[], Any], what: str = "") -> Any:
        """Ask again and again until something is so."""
        deadline, pause = time.monotonic() + DEADLINE_S, threading.Event()
        while not (value := condition()):
            assert time.monotonic() < deadline, f"never happened: {what}"
            pause.wait(0.02)
        return value

    def events(self, document_id: str, after: int = 0) -> list[dict[str, Any]]:
        """All events until the stream ends."""
        path = f"/v1/documents/{document_id}/events"
        text = self.client.get(path, params={"starting_after": after}).text
        assert text.endswith("data: [DONE]\n\n")
        return parse_events(text)

    def close_gate(self) -> None:
        self.running.do(self.ingestor.gate.clear)

    def open_gate(self) -> None:
        self.running.do(self.ingestor.gate.set)

    def ask(self, document_id: str, question: str, **fields: Any) -> dict[str, Any]:
        """A chat answer."""
        parts = [
            {"type": "document", "document_id": document_id},
            {"type": "text", "text": question},
        ]
        fields = {"messages": [{"role": "user", "content": parts}], "max_tokens": 4, **fields}
        reply = self.client.post("/v1/chat/completions", json=fields)
        assert reply.status_code == 200, reply.text
        answer: dict[str, Any] = reply.json()
        return answer


def parse_events(text: str) -> list[dict[str, Any]]:
    """The data of server-sent events, checked for their framing."""
    events = []
    for frame in text.split("\n\n")[:-1]:
        lines = [line for line in frame.split("\n") if not line.startswith(":")]
        if not lines or lines == ["data: [DONE]"]:
            continue
        number, kind, data = lines
        event = json.loads(data.removeprefix("data: "))
        assert number == f"id: {event['sequence_number']}"
        assert kind == f"event: {event['type']}"
        events.append(event)
    return events


def hashes_of(token_ids: Sequence[int], cache_salt: str) -> list[bytes]:
    return hash_blocks(token_ids, BLOCK_SIZE, block_salt(FINGERPRINT, cache_salt))


@contextlib.contextmanager
def run_site(
    folder: Path,
    fakes: Any,
    ingestor: FakeIngestor | None = None,
    min_free_bytes: int = 1,
    **fields: Any,
) -> Iterator[Site]:
    """A coordinator with jobs until the block ends."""
    jobs = {"segment_tokens": 256, "progress_interval_s": 0.01, "retry_s": 0.01, "max_wait_s": 30.0}
    jobs.update(fields.pop("jobs", {}))
    config = config_of(folder, jobs, fields)
    ingestor = ingestor or FakeIngestor(BLOCK_SIZE, FINGERPRINT, chunk_tokens=64)
    running = Running(config, ingestor, fakes, min_free_bytes)
    running.begin()
    try:
        key = config.api_keys[0] if config.api_keys else "none"
        headers = {"authorization": f"Bearer {key}"}
        with httpx.Client(base_url=running.url, timeout=60.0, headers=headers) as client:
            yield Site(running, client)
    finally:
        running.stop()


def config_of(folder: Path, jobs: dict[str, Any], fields: dict[str, Any]) -> CoordinatorConfig:
    return CoordinatorConfig(
        token="secret-token",
        pools=tuple(ExpectedPool(*pool) for pool in POOLS),
        control_listen=f"ipc://{folder}/c",
        port=0,
        max_model_len=4096,
        log_level="WARNING",
        jobs=JobLimits(**jobs),
        **{"model": "arithmetic", "block_size": BLOCK_SIZE, **fields},
    )


@pytest.fixture(scope="session")
def start_site(helpers: Any) -> Any:
    """The function that runs a coordinator with jobs until its block ends."""

    @contextlib.contextmanager
    def start(folder: Path, **fields: Any) -> Iterator[Site]:
        with run_site(folder, helpers.FakeCluster, **fields) as site:
            yield site

    return start


@pytest.fixture(scope="session")
def shared_site(start_site: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One coordinator for all tests that leave it as they found it."""
    with start_site(tmp_path_factory.mktemp("jobs")) as site:
        yield site


@pytest.fixture
def site(shared_site: Site) -> Site:
    shared_site.open_gate()
    return shared_site


@pytest.fixture(scope="session")
def documents_vocabulary() -> Any:
    """What tests make beside a site."""
    return type(
        "Vocabulary",
        (),
        {
            "FakeIngestor": FakeIngestor,
            "hashes_of": staticmethod(hashes_of),
            "parse_events": staticmethod(parse_events),
            "BLOCK_SIZE": BLOCK_SIZE,
            "FINGERPRINT": FINGERPRINT,
            "fingerprint_of": staticmethod(lambda model: load_config(model).fingerprint),
        },
    )
