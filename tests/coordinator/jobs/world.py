"""A whole coordinator in this process, on the fake cluster and the simulated ingestor."""

import asyncio
import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from coordinator.auth import Tenant, Tenants
from coordinator.config import BatchLimits, CoordinatorConfig, ExpectedPool, JobLimits, Limits
from coordinator.control import Owner
from coordinator.http.frontend import Frontend
from coordinator.http.line_server import LineServer
from coordinator.jobs.batches.input import request_of
from coordinator.jobs.context import Jobs
from coordinator.server import Coordinator, Parts
from coordinator.validation.bodies import Body
from kvcache.prefix import block_salt, hash_blocks
from modeling.checkpoint.config import load_config
from protocol.messages import CacheUpdate
from tests.coordinator.conftest import FakeCluster
from tests.coordinator.jobs.simulated_ingestor import SimulatedIngestor

DEADLINE_S = 60.0  # a busy machine is no failure
BLOCK_SIZE = 16
POOLS = (("prefill0", "prefill", 2, 1), ("decode0", "decode", 1, 1))
FINGERPRINT = load_config("arithmetic").fingerprint
ENDS = ("completed", "failed", "expired", "cancelled")


class FakeIngestor(SimulatedIngestor):
    """What it stores, the fake cluster's decode pool has cached."""

    fake: FakeCluster | None = None

    def _store(self, block_hashes: Sequence[bytes]) -> None:
        super()._store(block_hashes)
        hashes, fake = tuple(block_hashes), self.fake

        def tell() -> None:
            assert fake is not None
            fake.cache["decode0"].update(hashes)
            fake.say("decode0", CacheUpdate(stored=hashes))

        if fake is not None:
            fake.do(tell)


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


class Server(LineServer):
    """Notes which lines it was asked for; fails as a test has told it."""

    def __init__(self, frontend: Frontend, tenants: Tenants) -> None:
        super().__init__(frontend, tenants)
        self.asked: list[dict[str, Any]] = []
        self.failures: list[tuple[int, dict[str, Any]]] = []
        self.bugs: list[Exception] = []  # of making documents

    async def serve(
        self, tenant: str, url: str, body: Body, request_id: str
    ) -> tuple[int, dict[str, Any]]:
        self.asked.append(fields_of(body))
        if self.failures:
            return self.failures.pop()
        return await super().serve(tenant, url, body, request_id)

    async def make_document(self, tenant: Tenant, body: Body) -> dict[str, Any]:
        if self.bugs:
            raise self.bugs.pop()
        return await super().make_document(tenant, body)


class Running(threading.Thread):
    """A coordinator in a thread; ``do`` runs something in its event loop."""

    server: Server  # once it is ready

    def __init__(self, config: CoordinatorConfig, ingestor: FakeIngestor, clock: Clock) -> None:
        super().__init__(daemon=True)
        self.ingestor = ingestor
        self.url = ""
        self._failure: BaseException | None = None
        self._config = config
        self._clock = clock
        self._is_ready = threading.Event()

    def run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # shown by ``begin``
            self._failure = error
            self._is_ready.set()
            raise

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        parts = Parts(ingestor=self.ingestor, make_lines=self._make_lines, clock=self._clock)
        self.coordinator = Coordinator(
            self._config, self._on_control, self._on_ready, Owner(), parts
        )
        await self.coordinator.run()

    def _make_lines(self, frontend: Frontend, tenants: Tenants) -> Server:
        self.server = Server(frontend, tenants)
        return self.server

    def _on_control(self, control: str, _url: str) -> None:
        self.fake = FakeCluster(control, POOLS)
        self.fake.config = load_config(self._config.model)
        self.fake.block_size = self._config.block_size
        self.ingestor.fake = self.fake
        self.fake.start()

    def _on_ready(self, url: str) -> None:
        self.url = url
        self._is_ready.set()

    @property
    def jobs(self) -> Jobs:
        return self.coordinator.jobs

    def do(self, work: Callable[[], Any]) -> Any:
        """In the coordinator's loop; returns what an awaitable ``work`` makes."""

        async def call() -> Any:
            value = work()
            return await value if asyncio.iscoroutine(value) else value

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(DEADLINE_S)

    def begin(self) -> None:
        self.start()
        assert self._is_ready.wait(DEADLINE_S), "not ready"
        assert self._failure is None, self._failure

    def stop(self) -> None:
        if self.is_alive():
            self.loop.call_soon_threadsafe(self.coordinator.stop)
        self.join(DEADLINE_S)
        self.fake.stop()
        assert not self.is_alive()


@dataclass
class Site:
    """Clients of a running coordinator, and what a test does with documents, files and batches."""

    running: Running
    client: httpx.Client
    openai: openai.OpenAI
    clock: Clock

    @property
    def ingestor(self) -> FakeIngestor:
        return self.running.ingestor

    @property
    def server(self) -> Server:
        return self.running.server

    def until(self, condition: Callable[[], Any], what: str = "") -> Any:
        """Ask again and again until something is so."""
        deadline, pause = time.monotonic() + DEADLINE_S, threading.Event()
        while not (value := condition()):
            assert time.monotonic() < deadline, f"never happened: {what}"
            pause.wait(0.02)
        return value

    def pragma(self, text: str) -> None:
        """Change something of the database's connection."""
        database = self.running.jobs.database
        self.running.do(lambda: database.read(lambda c: c.execute(f"PRAGMA {text}").fetchall()))

    # -- documents ---------------------------------------------------------------------------------

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

    def hashes_of(self, document_id: str) -> tuple[bytes, ...]:
        """The blocks of a document that was computed."""
        requests = reversed(self.ingestor.requests)
        return next(r.block_hashes for r in requests if r.document_id == document_id)

    def evict(self, block_hashes: Sequence[bytes]) -> None:
        """Lose blocks, from the store and from the pools' caches."""
        self.running.do(lambda: self.ingestor.evict(block_hashes))
        for cache in self.running.fake.cache.values():
            self.running.do(lambda cache=cache: cache.difference_update(block_hashes))  # type: ignore[misc]

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

    # -- files and batches -------------------------------------------------------------------------

    def stored(self) -> list[str]:
        """Names in the folder of files."""
        return sorted(path.name for path in (self.running.jobs.folder / "files").iterdir())

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

    def ended(self, batch_id: str, *statuses: str) -> Any:
        """The batch when it has ended, in one of these states; else completed."""

        def ended() -> Any:
            batch = self.openai.batches.retrieve(batch_id)
            return batch if batch.status in ENDS else None

        batch = self.until(ended, f"{batch_id} ends")
        assert batch.status in (statuses or ("completed",)), batch
        return batch

    def results(self, batch: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """What lies in its output file and its error file."""
        return self._read(batch.output_file_id), self._read(batch.error_file_id)

    def _read(self, file_id: str | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        text = self.openai.files.content(file_id).text
        return [json.loads(line) for line in text.splitlines()]


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


def block_hashes(token_ids: Sequence[int], cache_salt: str) -> list[bytes]:
    return hash_blocks(token_ids, BLOCK_SIZE, block_salt(FINGERPRINT, cache_salt))


def config_of(folder: Path, **fields: Any) -> CoordinatorConfig:
    """Small segments, short pauses; ``jobs``, ``batches`` and ``limits`` are given as fields."""
    jobs = {"segment_tokens": 256, "progress_interval_s": 0.01, "retry_s": 0.01, "max_wait_s": 60.0}
    batches = {"min_free_bytes": 1, "retry_s": 0.01}
    return CoordinatorConfig(
        token="secret-token",
        pools=tuple(ExpectedPool(*pool) for pool in POOLS),
        control_listen=f"ipc://{folder}/c",
        port=0,
        max_model_len=4096,
        log_level="WARNING",
        limits=Limits(**fields.pop("limits", {})),
        jobs=JobLimits(**{**jobs, **fields.pop("jobs", {})}),
        batches=BatchLimits(**{**batches, **fields.pop("batches", {})}),
        **{"model": "arithmetic", "block_size": BLOCK_SIZE, **fields},
    )


@contextlib.contextmanager
def start_site(folder: Path, ingestor: FakeIngestor | None = None, **fields: Any) -> Iterator[Site]:
    """A coordinator with jobs until the block ends; they are kept if there is a ``data_dir``."""
    config, clock = config_of(folder, **fields), Clock()
    ingestor = ingestor or FakeIngestor(BLOCK_SIZE, FINGERPRINT, chunk_tokens=64)
    running = Running(config, ingestor, clock)
    running.begin()
    try:
        key = config.api_keys[0] if config.api_keys else "none"
        headers = {"authorization": f"Bearer {key}"}
        with (
            httpx.Client(base_url=running.url, timeout=2 * DEADLINE_S, headers=headers) as client,
            openai.OpenAI(
                base_url=f"{running.url}/v1", api_key=key, max_retries=0, timeout=2 * DEADLINE_S
            ) as theirs,
        ):
            yield Site(running, client, theirs, clock)
    finally:
        running.stop()
