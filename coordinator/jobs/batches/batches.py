"""What a caller may do with batches beside what it may do with any job (engine/engine.py).

1. ``create`` links the input, then writes the batch, and only then answers.
2. ``retry`` goes on with what the server has died of, and has set aside.
"""

import asyncio
import secrets
from dataclasses import dataclass

from coordinator.config import BatchLimits
from coordinator.errors import invalid_value
from coordinator.jobs.batches.batch import ENDPOINTS, Batch
from coordinator.jobs.batches.lines import LineTable
from coordinator.jobs.batches.states import BatchEvent, BatchState
from coordinator.jobs.engine.disk import check_space
from coordinator.jobs.engine.engine import Engine
from coordinator.jobs.engine.gate import Gate
from coordinator.jobs.engine.suspects import LINE, Name
from coordinator.jobs.engine.table import Connection, Idempotency, JobTable
from coordinator.jobs.files.files import BATCH, Files, StoredFile, new_file_id
from coordinator.jobs.files.folder import DurableFolder
from protocol.errors import RequestError

WINDOWS = ("24h",)  # OpenAI's
MAX_METADATA = 16
MAX_KEY_CHARS, MAX_VALUE_CHARS = 64, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """What a caller asks for; checked by ``Batches.create``."""

    tenant: str
    model: str
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_ttl_s: int | None = None


@dataclass(frozen=True, slots=True)
class BatchParts:
    """What all code of batches works with, put together once."""

    table: JobTable[Batch]
    lines: LineTable
    files: Files  # has the uploaded inputs, and will have the outputs
    inputs: DurableFolder  # of batches that are not over; see input.py
    gate: Gate  # that all work goes through
    limits: BatchLimits

    async def forgive(self, batch_id: str) -> None:
        """Forget which lines of a batch were set aside."""
        for number in self.lines_set_aside(batch_id):
            await self.gate.retry(Name(LINE, line_key(batch_id, number)))

    def lines_set_aside(self, batch_id: str) -> list[int]:
        start = line_key(batch_id, "")
        keys = self.gate.set_aside(LINE)
        return [int(key.removeprefix(start)) for key in keys if key.startswith(start)]


class Batches:
    """All batches.

    Args:
        parts: that they work with.
        engine: keeps their jobs.
    """

    def __init__(self, parts: BatchParts, engine: Engine[Batch]) -> None:
        self.parts = parts
        self.engine = engine
        self.table = parts.table

    async def create(self, asked: BatchRequest, idempotency: Idempotency | None = None) -> Batch:
        """Accept a batch, or find the one that an earlier request with the same key has made.

        Raises:
            RequestError: it cannot be accepted, or there is no room for its results.
        """
        _check(asked)
        files, inputs, limits = self.parts.files, self.parts.inputs, self.parts.limits
        file = await files.get(asked.tenant, asked.input_file_id, "input_file_id")
        self._check_file(file)
        folder, needed = files.folder.path, 2 * file.size_bytes
        await asyncio.to_thread(check_space, folder, needed, min_free_bytes=limits.min_free_bytes)
        batch = self._new(asked)

        def check(connection: Connection) -> None:
            self.table.check_pending(
                connection,
                batch.tenant,
                (limits.max_open, limits.max_all_open),
                "too_many_batches",
                "{} batches are under way: wait for one, or cancel one",
            )

        try:
            await asyncio.to_thread(inputs.link, files.path(file.file_id), batch.id)
            kept, is_new = await self.table.insert(batch, check, idempotency)
        except FileNotFoundError as error:  # deleted in this moment
            raise RequestError(
                "no such file", code="file_not_found", param="input_file_id", status=404
            ) from error
        except RequestError:
            await asyncio.to_thread(inputs.remove, batch.id)
            raise
        if not is_new:
            await asyncio.to_thread(inputs.remove, batch.id)
        self.engine.runner.wake()
        return kept

    async def retry(self, tenant: str, batch_id: str) -> Batch:
        """Go on with a batch that was set aside, or with those lines of a running one.

        Raises:
            RequestError: ``not_retryable``: nothing of it is, or it has ended.
        """
        batch = await self.table.get(tenant, batch_id)
        numbers = self.parts.lines_set_aside(batch_id)
        if batch.state is BatchState.IN_PROGRESS and numbers:
            batch = await self.parts.lines.reopen(batch_id, numbers)
            await self.parts.forgive(batch_id)
            self.engine.runner.wake()
            return batch
        return await self.engine.retry(
            tenant,
            batch_id,
            lambda found: found.after(_way_back(found), error=None),
            "not_retryable",
            "only what was set aside is tried again; after the end of a batch, send the lines of "
            "its error file in another one",
        )

    def _check_file(self, file: StoredFile) -> None:
        if file.purpose != BATCH:
            raise invalid_value(
                "input_file_id", f"the file's purpose is {file.purpose}, not {BATCH}"
            )
        most = self.parts.limits.max_batch_bytes
        if file.size_bytes > most:
            raise invalid_value(
                "input_file_id", f"the file has {file.size_bytes} bytes, a batch at most {most}"
            )

    def _new(self, asked: BatchRequest) -> Batch:
        now, limits = int(self.table.clock()), self.parts.limits
        return Batch(
            id=f"batch_{secrets.token_hex(16)}",
            tenant=asked.tenant,
            model=asked.model,
            endpoint=asked.endpoint,
            input_file_id=asked.input_file_id,
            completion_window=asked.completion_window,
            created_at=now,
            expires_at=now + int(limits.window_s),
            keep_until=now + int(limits.window_s + limits.keep_s),
            output_file_id=new_file_id(),
            error_file_id=new_file_id(),
            output_ttl_s=asked.output_ttl_s or int(limits.file_ttl_s),
            metadata=asked.metadata,
        )


def line_key(batch_id: str, number: int | str) -> str:
    """The name of a line among those of all batches."""
    return f"{batch_id}:{number}"


def _way_back(batch: Batch) -> BatchEvent:
    """Where a batch was when it was set aside: in an end, or at its beginning."""
    if BatchState.CANCELLING.value in batch.times:
        return BatchEvent.CANCEL_AGAIN
    if BatchState.EXPIRING.value in batch.times:
        return BatchEvent.EXPIRE_AGAIN
    return BatchEvent.WRITE_AGAIN if batch.num_lines else BatchEvent.VALIDATE_AGAIN


def _check(asked: BatchRequest) -> None:
    if asked.endpoint not in ENDPOINTS:
        raise invalid_value("endpoint", f"endpoint must be one of {', '.join(ENDPOINTS)}")
    if asked.completion_window not in WINDOWS:
        raise invalid_value(
            "completion_window", f"completion_window must be {' or '.join(WINDOWS)}"
        )
    metadata = asked.metadata or {}
    is_long = any(len(k) > MAX_KEY_CHARS or len(v) > MAX_VALUE_CHARS for k, v in metadata.items())
    if len(metadata) > MAX_METADATA or is_long:
        raise invalid_value(
            "metadata",
            f"metadata has at most {MAX_METADATA} keys of {MAX_KEY_CHARS} characters, and texts "
            f"of {MAX_VALUE_CHARS}",
        )
