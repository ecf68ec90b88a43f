"""Everything of the jobs, built once: the database, the engine's two kinds of work, the files.

Without a data folder the database is in memory and the files are in a temporary folder: all of it
is gone at the end.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.config import CoordinatorConfig
from coordinator.jobs.batches.batch import Batch
from coordinator.jobs.batches.batches import Batches, BatchParts
from coordinator.jobs.batches.lines import LineTable
from coordinator.jobs.batches.work import BatchWork, LineServer
from coordinator.jobs.documents.admission import Admission
from coordinator.jobs.documents.document import Document
from coordinator.jobs.documents.document_tokens import DocumentTokens
from coordinator.jobs.documents.documents import Documents
from coordinator.jobs.documents.identity import ModelFacts
from coordinator.jobs.documents.ingestor import Ingestor
from coordinator.jobs.documents.parts import DocumentParts
from coordinator.jobs.documents.pins import PinPolicy
from coordinator.jobs.documents.work import DocumentWork
from coordinator.jobs.engine.database import Database
from coordinator.jobs.engine.disk import DiskWatch
from coordinator.jobs.engine.engine import Engine
from coordinator.jobs.engine.gate import Budget, Gate
from coordinator.jobs.engine.marks import Marks, boot_id
from coordinator.jobs.engine.table import JobTable
from coordinator.jobs.files.files import Files
from coordinator.jobs.files.folder import DurableFolder
from coordinator.jobs.files.quotas import Quota
from coordinator.jobs.schema import prepare
from coordinator.text.tasks import Workers
from coordinator.text.tokenizing import TextIdentity
from modeling.checkpoint.config import ModelConfig
from protocol.errors import RequestError
from protocol.kv import DTYPE_BYTES
from protocol.process.crash_points import CrashPoints
from protocol.process.folders import temporary_folder

_log = logging.getLogger(__name__)

DATABASE_NAME = "jobs.sqlite"
RECOVERY_PAUSE_S = 1.0
SPARE_STARTS = 2  # of the budget, that durable work never uses
ROOM_TO_ASK = 1  # tokens that must fit behind a document


@dataclass(frozen=True, slots=True)
class JobDependencies:
    """What the jobs need of a coordinator."""

    config: CoordinatorConfig
    model: ModelConfig
    text: TextIdentity
    workers: Workers
    ingestor: Ingestor
    max_model_len: Callable[[], int]  # of a request, now
    clock: Callable[[], float] = time.time  # Unix time, as callers see it
    counters: Counter[str] = field(default_factory=Counter)  # hits of failpoints, too


class Jobs:
    """The jobs of a coordinator. Create it in its event loop, then ``attach``, then ``start``.

    Raises:
        ConfigError: the data folder cannot be used.
    """

    def __init__(self, dependencies: JobDependencies) -> None:
        config, clock = dependencies.config, dependencies.clock
        self._leftovers = contextlib.ExitStack()
        self.folder = self._folder(config.data_dir)
        self.min_free_bytes = config.batches.min_free_bytes
        secret = config.secret if config.data_dir else ""
        self.disk = DiskWatch(self.folder, secret, self.min_free_bytes)
        path = self.folder / DATABASE_NAME if config.data_dir else None
        if path is not None:
            path.touch(mode=0o600, exist_ok=True)  # it holds the tenants' salts
        crash_points = CrashPoints(config.failpoints, dependencies.counters)
        self.database = Database(path, prepare, crash_points, self.disk.ballast)
        self._leftovers.callback(self.database.close)
        self.disk.refusal = self.database.refusal
        self.gate = self._gate(config, clock)
        self._leftovers.callback(self.gate.close)
        quota = _quota(dependencies)
        self.files = Files(
            self.database, self.folder / "files", config.batches, clock, crash_points, quota
        )
        self.documents = self._documents(dependencies, quota, crash_points)
        self.batches = self._batches(dependencies, crash_points)
        self.recovered = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def _folder(self, data_dir: str) -> Path:
        if not data_dir:
            return self._leftovers.enter_context(temporary_folder("baton-jobs-"))
        folder = Path(data_dir)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    def _gate(self, config: CoordinatorConfig, clock: Callable[[], float]) -> Gate:
        max_deaths = config.jobs.max_crashes
        # Some of the starts are left for what is not our doing.
        most = max(max_deaths, config.restart_budget - SPARE_STARTS)
        budget = Budget(max_deaths, most if config.restart_budget else 0, config.restart_window_s)
        return Gate(self.database, Marks(self.folder / "marks", boot_id()), budget, clock)

    def _documents(
        self, dependencies: JobDependencies, quota: Quota, crash_points: CrashPoints
    ) -> Documents:
        config, ingestor = dependencies.config, dependencies.ingestor
        limits = config.jobs
        table = JobTable(self.database, Document, dependencies.clock, limits)
        files = DurableFolder(self.folder / "documents", "", crash_points)
        facts = ModelFacts(
            name=config.model_name,
            fingerprint=dependencies.model.fingerprint,
            block_size=config.block_size,
            kv_dtype=config.kv_dtype or dependencies.model.dtype,
            text=dependencies.text,
        )

        def max_tokens() -> int:
            return min(ingestor.max_tokens(), dependencies.max_model_len() - ROOM_TO_ASK)

        pins = PinPolicy(limits, quota.bytes_per_token)
        parts = DocumentParts(
            table=table,
            files=files,
            tokens=DocumentTokens(files, dependencies.workers, facts),
            ingestor=ingestor,
            admission=Admission(table, limits, quota, pins),
            gate=self.gate,
            limits=limits,
            crash_points=crash_points,
            max_tokens=max_tokens,
            min_free_bytes=self.min_free_bytes,
        )
        num_prefill_pools = sum(pool.role == "prefill" for pool in config.pools)
        work = DocumentWork(parts, limits.max_running or max(1, num_prefill_pools))
        return Documents(parts, Engine(work, table, self.gate, limits))

    def _batches(self, dependencies: JobDependencies, crash_points: CrashPoints) -> Batches:
        table = JobTable(self.database, Batch, dependencies.clock, dependencies.config.jobs)
        parts = BatchParts(
            table=table,
            lines=LineTable(self.database, table),
            files=self.files,
            inputs=DurableFolder(self.folder / "batches", "input", crash_points),
            gate=self.gate,
            limits=dependencies.config.batches,
        )
        self._batch_work = BatchWork(parts, dependencies.workers)
        engine = Engine(self._batch_work, table, self.gate, dependencies.config.jobs)
        return Batches(parts, engine)

    def attach(self, server: LineServer) -> None:
        """Say who answers the lines of batches."""
        self._batch_work.server = server

    async def start(self) -> None:
        """Go on with what an earlier process has left."""
        self._tasks = [asyncio.create_task(work) for work in (self._work(), self.disk.run())]

    async def _work(self) -> None:
        await self._recover()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.documents.engine.run())
            tasks.create_task(self.batches.engine.run())

    async def _recover(self) -> None:
        while not self.recovered.is_set():
            try:
                await self.gate.recover()
                await self.files.recover()
                await self.documents.engine.recover()
                await self.batches.engine.recover()
                self.recovered.set()
            except RequestError as error:  # a full disk: requests are served nevertheless
                _log.error("jobs wait: %s", error)
                await asyncio.sleep(RECOVERY_PAUSE_S)

    async def watch(self) -> None:
        """Raises what a worker has died of: a bug, with which the process is to end."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def stop(self) -> None:
        """Abort what runs; it goes on when the next process starts. Who waits is told."""
        self.documents.table.changes.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._tasks = []

    async def close(self) -> None:
        """Stop, and close the database: nothing may be asked afterwards. Idempotent."""
        await self.stop()
        self._leftovers.close()


def _quota(dependencies: JobDependencies) -> Quota:
    config, model = dependencies.config, dependencies.model
    max_bytes = config.jobs.tenant_quota_bytes
    if not max_bytes and (config.api_keys or config.api_key_file):
        max_bytes = config.jobs.disk_quota_bytes // 2
    return Quota(max_bytes, kv_bytes_per_token(model, config.kv_dtype or model.dtype))


def kv_bytes_per_token(model: ModelConfig, dtype: str) -> int:
    """Of all layers, on all ranks together."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * DTYPE_BYTES[dtype]
