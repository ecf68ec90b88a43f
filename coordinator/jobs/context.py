"""Everything of the jobs, built once: the database, and what works on it.

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

import msgspec

from coordinator.config import CoordinatorConfig
from coordinator.jobs.batches.batches import Batches
from coordinator.jobs.batches.input import Inputs
from coordinator.jobs.batches.runner import BatchRunner, LineServer
from coordinator.jobs.batches.table import SCHEMA as BATCH_SCHEMA
from coordinator.jobs.batches.table import BatchTable
from coordinator.jobs.database import Database
from coordinator.jobs.documents.document_tokens import DocumentTokens
from coordinator.jobs.documents.documents import Documents, Parts
from coordinator.jobs.documents.files import DocumentFiles
from coordinator.jobs.documents.identity import ModelFacts
from coordinator.jobs.documents.ingestor import Ingestor
from coordinator.jobs.documents.maintenance import Maintenance
from coordinator.jobs.documents.pins import PinPolicy
from coordinator.jobs.documents.preparing import Preparing
from coordinator.jobs.documents.rows import SCHEMA as DOCUMENT_SCHEMA
from coordinator.jobs.documents.runner import Runner
from coordinator.jobs.documents.table import DocumentTable
from coordinator.jobs.files import SCHEMA as FILE_SCHEMA
from coordinator.jobs.files import Files
from coordinator.jobs.gate import SCHEMA as GATE_SCHEMA
from coordinator.jobs.gate import Budget, Gate
from coordinator.jobs.marks import Marks, boot_id
from coordinator.jobs.questions.questions import Questions
from coordinator.jobs.quotas import Quota
from coordinator.jobs.storage import Storage
from coordinator.text.tasks import Workers
from coordinator.text.tokenizing import TextIdentity
from modeling.checkpoint.config import ModelConfig
from protocol.crash_points import CrashPoints
from protocol.errors import RequestError
from protocol.folders import temporary_folder
from protocol.kv import DTYPE_BYTES

_log = logging.getLogger(__name__)

DATABASE_NAME = "jobs.sqlite"
RECOVERY_PAUSE_S = 1.0
SPARE_STARTS = 2  # of the budget, that durable work never uses
ROOM_TO_ASK = 1  # tokens that must fit behind a document


@dataclass(frozen=True, slots=True)
class JobDependencies:
    """What the jobs find in a coordinator."""

    config: CoordinatorConfig
    model: ModelConfig
    text: TextIdentity
    workers: Workers
    ingestor: Ingestor
    max_model_len: Callable[[], int]  # of a request, now
    clock: Callable[[], float] = time.time  # Unix time, as callers see it
    min_free_bytes: int = 0  # 0 takes what is configured
    counters: Counter[str] = field(default_factory=Counter)  # hits of failpoints, too


class Jobs:
    """The jobs of a coordinator. Create it in its event loop, then ``start``.

    Raises:
        ConfigError: the data folder cannot be used.
    """

    def __init__(self, dependencies: JobDependencies) -> None:
        config = dependencies.config
        self._leftovers = contextlib.ExitStack()
        self._workers = dependencies.workers
        if config.data_dir:
            self.folder = Path(config.data_dir)
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        else:
            self.folder = self._leftovers.enter_context(temporary_folder("baton-jobs-"))
        self.min_free_bytes = dependencies.min_free_bytes or config.batches.min_free_bytes
        secret = config.secret if config.data_dir else ""
        self.storage = Storage(self.folder, secret, self.min_free_bytes)
        path = self.folder / DATABASE_NAME if config.data_dir else None
        if path is not None:
            path.touch(mode=0o600, exist_ok=True)  # it holds the tenants' salts
        crash_points = CrashPoints(config.failpoints, dependencies.counters)
        schema = (*DOCUMENT_SCHEMA, *FILE_SCHEMA, *BATCH_SCHEMA, *GATE_SCHEMA)
        self.database = Database(path, schema, crash_points, self.storage.ballast)
        self._leftovers.callback(self.database.close)
        self.storage.refusal = self.database.refusal
        self.gate = self._gate(dependencies)
        clock = dependencies.clock
        self._quota = _quota(dependencies)
        self.files = Files(
            *(self.database, self.folder / "files", config.batches, clock, crash_points),
            check_quota=self._quota.check,
        )
        inputs = Inputs(self.folder / "batches", crash_points)
        table = BatchTable(self.database, clock)
        self.batches = Batches(table, self.files, inputs, config.batches, self.gate)
        self._batch_runner: BatchRunner | None = None
        self.documents = self._documents(dependencies, crash_points)
        self.questions = Questions(self.documents)
        self._tasks: list[asyncio.Task[None]] = []

    def _gate(self, dependencies: JobDependencies) -> Gate:
        config = dependencies.config
        max_deaths = config.jobs.max_crashes
        # Some of the starts are left for what is not our doing.
        most = max(max_deaths, config.restart_budget - SPARE_STARTS)
        gate = Gate(
            self.database,
            Marks(self.folder / "marks", boot_id()),
            Budget(max_deaths, most if config.restart_budget else 0, config.restart_window_s),
            dependencies.clock,
        )
        self._leftovers.callback(gate.close)
        return gate

    def _documents(self, dependencies: JobDependencies, crash_points: CrashPoints) -> Documents:
        config, model, ingestor = dependencies.config, dependencies.model, dependencies.ingestor
        limits, max_model_len = config.jobs, dependencies.max_model_len

        def max_tokens() -> int:
            return min(ingestor.max_tokens(), max_model_len() - ROOM_TO_ASK)

        facts = ModelFacts(
            name=config.model_name,
            fingerprint=model.fingerprint,
            block_size=config.block_size,
            kv_dtype=config.kv_dtype or model.dtype,
            text=dependencies.text,
        )
        num_prefill_pools = sum(pool.role == "prefill" for pool in config.pools)
        files = DocumentFiles(self.folder / "documents", crash_points)
        tokens = DocumentTokens(files, dependencies.workers, facts)
        policy = PinPolicy(limits, self._quota.bytes_per_token)
        table = DocumentTable(self.database, limits, dependencies.clock, self._quota)
        preparing = Preparing(table, files, tokens, limits, max_tokens, crash_points)
        max_running = limits.max_running or max(1, num_prefill_pools)
        limits = msgspec.structs.replace(limits, max_running=max_running)
        runner = Runner(table, preparing, ingestor, policy, limits, self.gate)
        maintenance = Maintenance(table, files, tokens, ingestor, runner, self.gate)
        return Documents(
            Parts(
                table=table,
                files=files,
                tokens=tokens,
                ingestor=ingestor,
                policy=policy,
                runner=runner,
                maintenance=maintenance,
                gate=self.gate,
                limits=limits,
                max_tokens=max_tokens,
                min_free_bytes=self.min_free_bytes,
            )
        )

    def attach(self, server: LineServer) -> None:
        """Who answers the lines of batches; before ``start``."""
        self._batch_runner = BatchRunner(self.batches, server, self._workers)

    async def start(self) -> None:
        """Go on with what an earlier process has left; before anything is taken in."""
        self._tasks = [asyncio.create_task(self._work())]
        self._tasks.append(asyncio.create_task(self.storage.watch()))
        if self._batch_runner is not None:
            self._tasks.append(asyncio.create_task(self._batch_runner.run()))

    async def _work(self) -> None:
        await self._recover()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.documents.runner.run())
            tasks.create_task(self.documents.maintenance.run())

    async def _recover(self) -> None:
        documents = self.documents
        while True:
            try:
                await self.files.recover()
                await documents.table.claim()
                await self.gate.recover()
                await documents.maintenance.recover()
                await documents.runner.recover()
                await documents.maintenance.tell_pins()
                return
            except RequestError as error:  # a full disk: requests are served nevertheless
                _log.error("documents wait: %s", error)
                documents.table.refusal = error
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
