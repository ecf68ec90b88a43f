"""Everything of the jobs, built once: the database, and what works on it.

Without a data folder the database is in memory and the files are in a temporary folder: all of it
is gone at the end.
"""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from coordinator.config import CoordinatorConfig
from coordinator.jobs.database import Database
from coordinator.jobs.document_files import DocumentFiles
from coordinator.jobs.document_rows import SCHEMA as DOCUMENT_SCHEMA
from coordinator.jobs.document_table import DocumentTable
from coordinator.jobs.documents import Documents, Parts
from coordinator.jobs.files import SCHEMA as FILE_SCHEMA
from coordinator.jobs.files import Files
from coordinator.jobs.ingestor import Ingestor
from coordinator.jobs.keeper import Keeper
from coordinator.jobs.library import Library, ModelFacts
from coordinator.jobs.pins import PinPolicy
from coordinator.jobs.preparing import Preparing
from coordinator.jobs.questions import Questions
from coordinator.jobs.runner import Runner
from coordinator.tokenizing import Tokenization
from modeling.config import ModelConfig

DATABASE_NAME = "jobs.sqlite"
DTYPE_BYTES = {"float32": 4}  # else two
NUM_THREADS = 2
ROOM_TO_ASK = 1  # tokens that must fit behind a document


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the jobs find in a coordinator."""

    config: CoordinatorConfig
    model: ModelConfig
    tokenization: Tokenization
    ingestor: Ingestor
    max_model_len: Callable[[], int]  # of a request, now
    clock: Callable[[], float] = time.time  # Unix time, as callers see it
    min_free_bytes: int = 0  # 0 takes what is configured


class Jobs:
    """The jobs of a coordinator. Create it in its event loop, then ``start``.

    Raises:
        ConfigError: the data folder cannot be used.
    """

    def __init__(self, surroundings: Surroundings) -> None:
        config = surroundings.config
        self._leftovers = contextlib.ExitStack()
        if config.data_dir:
            self.folder = Path(config.data_dir)
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        else:
            temporary = tempfile.TemporaryDirectory(prefix="baton-jobs-")
            self.folder = Path(self._leftovers.enter_context(temporary))
        path = self.folder / DATABASE_NAME if config.data_dir else None
        if path is not None:
            path.touch(mode=0o600, exist_ok=True)  # it holds the tenants' salts
        self.database = Database(path, (*DOCUMENT_SCHEMA, *FILE_SCHEMA))
        self._leftovers.callback(self.database.close)
        self.min_free_bytes = surroundings.min_free_bytes or config.batches.min_free_bytes
        clock = surroundings.clock
        self.files = Files(self.database, self.folder / "files", config.batches, clock)
        self.documents = self._documents(surroundings)
        self.questions = Questions(self.documents)
        self._tasks: list[asyncio.Task[None]] = []

    def _documents(self, surroundings: Surroundings) -> Documents:
        config, model, ingestor = surroundings.config, surroundings.model, surroundings.ingestor
        limits, max_model_len = config.jobs, surroundings.max_model_len

        def max_tokens() -> int:
            return min(ingestor.max_tokens(), max_model_len() - ROOM_TO_ASK)

        facts = ModelFacts(config.model_name, model.fingerprint, config.block_size)
        num_prefill_pools = sum(pool.role == "prefill" for pool in config.pools)
        files = DocumentFiles(self.folder / "documents")
        # A long document is encoded for seconds: requests have other threads.
        tokenization = surroundings.tokenization.aside(NUM_THREADS)
        self._leftovers.callback(tokenization.close)
        library = Library(files, tokenization, facts)
        policy = PinPolicy(limits, kv_bytes_per_token(model))
        table = DocumentTable(self.database, limits, surroundings.clock)
        preparing = Preparing(table, files, library, limits, max_tokens)
        max_running = limits.max_running or max(1, num_prefill_pools)
        runner = Runner(table, preparing, ingestor, policy, limits, max_running)
        keeper = Keeper(table, files, library, ingestor, runner)
        return Documents(
            Parts(
                table=table,
                files=files,
                library=library,
                ingestor=ingestor,
                policy=policy,
                runner=runner,
                keeper=keeper,
                limits=limits,
                max_tokens=max_tokens,
                min_free_bytes=self.min_free_bytes,
            )
        )

    async def start(self) -> None:
        """Put right what an earlier process has left, and go on with it."""
        await self.documents.table.claim()
        await self.files.recover()
        await self.documents.keeper.recover()
        await self.documents.runner.recover()
        self._tasks = [
            asyncio.create_task(self.documents.runner.run()),
            asyncio.create_task(self.documents.keeper.run()),
        ]

    async def watch(self) -> None:
        """Raises what a worker has died of: a bug, with which the process is to end."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def stop(self) -> None:
        """Abort what runs; it goes on when the next process starts. Who waits is told."""
        self.documents.table.bell.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._tasks = []

    async def close(self) -> None:
        """Stop, and close the database: nothing may be asked afterwards. Idempotent."""
        await self.stop()
        self._leftovers.close()


def kv_bytes_per_token(model: ModelConfig) -> int:
    """Of all layers, on all ranks together."""
    width = DTYPE_BYTES.get(model.dtype, 2)
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * width
