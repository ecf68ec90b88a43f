"""What a caller may do with batches; every method is for one tenant.

1. ``create`` links the input, then writes the batch, and only then answers.
2. The runner (batch_runner.py) validates it, has its lines answered and writes its files.
3. ``cancel`` ends it: what has been answered is written, the rest is not begun.
4. ``retry`` goes on with what the server has died of, and has set aside.
"""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from coordinator.config import BatchLimits
from coordinator.jobs import suspects
from coordinator.jobs.batches.batch import ENDPOINTS, TIMES, Batch
from coordinator.jobs.batches.input import Inputs
from coordinator.jobs.batches.states import RUNNING, BatchEvent, BatchState
from coordinator.jobs.batches.table import BatchTable
from coordinator.jobs.files import BATCH, Files, StoredFile, new_file_id
from coordinator.jobs.gate import Gate
from coordinator.jobs.space import check_space
from coordinator.jobs.suspects import LINE, Name
from protocol.errors import IllegalTransition, RequestError

ID_PREFIX = "batch_"
WINDOWS = ("24h",)  # OpenAI's
MAX_METADATA = 16
MAX_KEY_CHARS, MAX_VALUE_CHARS = 64, 512


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What a caller asks for; checked by ``Batches.create``."""

    tenant: str
    model: str
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_ttl_s: int | None = None


class Batches:
    """All batches.

    Args:
        table: their rows.
        files: has their inputs, and will have their outputs.
        inputs: keeps what is being worked on.
        limits: of one batch and of all.
        gate: knows what is set aside.
    """

    def __init__(
        self, table: BatchTable, files: Files, inputs: Inputs, limits: BatchLimits, gate: Gate
    ) -> None:
        self.gate = gate
        self.table = table
        self.files = files
        self.inputs = inputs
        self.limits = limits
        self._on_change: Callable[[str], None] = lambda _batch_id: None

    def attach(self, on_change: Callable[[str], None]) -> None:
        """Have the runner told of a batch that is new, or was cancelled."""
        self._on_change = on_change

    async def create(self, asked: BatchRequest) -> Batch:
        """Accept a batch.

        Raises:
            RequestError: it cannot be accepted, or there is no room for its results.
        """
        _check(asked)
        file = await self.files.get(asked.tenant, asked.input_file_id, "input_file_id")
        self._check_file(file)
        needed = 2 * file.size_bytes
        await asyncio.to_thread(
            check_space, self.files.folder, needed, min_free_bytes=self.limits.min_free_bytes
        )
        batch = self._new(asked)
        try:
            await asyncio.to_thread(self.inputs.add, batch.batch_id, self.files.path(file.file_id))
            await self.table.insert(batch, self.limits.max_open, self.limits.max_all_open)
        except FileNotFoundError as error:  # deleted in this moment
            raise RequestError(
                "no such file", code="file_not_found", param="input_file_id", status=404
            ) from error
        except RequestError:
            await asyncio.to_thread(self.inputs.remove, batch.batch_id)
            raise
        self._on_change(batch.batch_id)
        return batch

    async def get(self, tenant: str, batch_id: str) -> Batch:
        """A batch of the tenant's.

        Raises:
            RequestError: there is none (404).
        """
        batch = await self.table.find(batch_id)
        if batch is None or batch.tenant != tenant:
            raise RequestError("no such batch", code="batch_not_found", status=404)
        return batch

    async def page(self, tenant: str, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """Batches of the tenant's, the newest first, and whether there are more.

        Raises:
            RequestError: the batch to go on after is not there.
        """
        if after is not None:
            await self.get(tenant, after)
        return await self.table.page(tenant, after, limit)

    async def cancel(self, tenant: str, batch_id: str) -> tuple[Batch, bool]:
        """Begin no more lines of a batch; and whether it was running until now.

        Raises:
            RequestError: ``not_cancellable``: it has ended otherwise.
        """
        await self.get(tenant, batch_id)
        now = self.table.clock()
        was_running = False

        def work(found: Batch) -> Batch:
            nonlocal was_running
            was_running = found.state in RUNNING
            return found.stepped(BatchEvent.CANCEL, now) if was_running else found

        batch = await self.table.change(batch_id, work)
        if was_running:
            self._on_change(batch_id)
        elif batch.state not in (BatchState.CANCELLING, BatchState.CANCELLED):
            raise RequestError(
                f"the batch is {batch.state.value}: only one that is running is cancelled",
                code="not_cancellable",
                status=409,
            )
        return batch, was_running

    async def retry(self, tenant: str, batch_id: str) -> Batch:
        """Go on with a batch that was set aside, or with those lines of a running one.

        Raises:
            RequestError: ``not_retryable``: nothing of it is, or it has ended.
        """
        batch = await self.get(tenant, batch_id)
        try:
            if batch.state is BatchState.SET_ASIDE:
                await self.gate.retry(Name(suspects.BATCH, batch_id))
                now = self.table.clock()
                batch = await self.table.change(
                    batch_id, lambda found: found.stepped(_way_back(found), now, errors=())
                )
            elif numbers := self._lines_set_aside(batch_id):
                batch = await self.table.reopen(batch_id, numbers)
                await self.forgive(batch_id)
            else:
                raise IllegalTransition("nothing of it is set aside")
        except IllegalTransition as error:
            raise RequestError(
                f"the batch is {batch.state.value}: only what was set aside is tried again; after "
                f"the end of a batch, send the lines of its error file in another one",
                code="not_retryable",
                status=409,
            ) from error
        self._on_change(batch_id)
        return batch

    async def forgive(self, batch_id: str) -> None:
        """Forget which lines of a batch were set aside."""
        for number in self._lines_set_aside(batch_id):
            await self.gate.retry(Name(LINE, line_key(batch_id, number)))

    def _lines_set_aside(self, batch_id: str) -> list[int]:
        keys = self.gate.set_aside(LINE)
        start = line_key(batch_id, "")
        return [int(key.removeprefix(start)) for key in keys if key.startswith(start)]

    def _check_file(self, file: StoredFile) -> None:
        if file.purpose != BATCH:
            raise _invalid("input_file_id", f"the file's purpose is {file.purpose}, not {BATCH}")
        if file.size_bytes > self.limits.max_batch_bytes:
            raise _invalid(
                "input_file_id",
                f"the file has {file.size_bytes} bytes, a batch at most "
                f"{self.limits.max_batch_bytes}",
            )

    def _new(self, asked: BatchRequest) -> Batch:
        now = int(self.table.clock())
        return Batch(
            batch_id=f"{ID_PREFIX}{secrets.token_hex(16)}",
            tenant=asked.tenant,
            model=asked.model,
            endpoint=asked.endpoint,
            input_file_id=asked.input_file_id,
            completion_window=asked.completion_window,
            created_at=now,
            expires_at=now + int(self.limits.window_s),
            output_file_id=new_file_id(),
            error_file_id=new_file_id(),
            output_ttl_s=asked.output_ttl_s or int(self.limits.file_ttl_s),
            metadata=asked.metadata,
        )


def line_key(batch_id: str, number: int | str) -> str:
    """The name of a line among those of all batches."""
    return f"{batch_id}:{number}"


def _way_back(batch: Batch) -> BatchEvent:
    """Where a batch was when it was set aside: in an end, or at its beginning."""
    if TIMES[BatchState.CANCELLING] in batch.times:
        return BatchEvent.CANCEL
    if TIMES[BatchState.EXPIRING] in batch.times:
        return BatchEvent.EXPIRE
    return BatchEvent.WRITE_AGAIN if batch.num_lines else BatchEvent.VALIDATE_AGAIN


def _check(asked: BatchRequest) -> None:
    if asked.endpoint not in ENDPOINTS:
        raise _invalid("endpoint", f"endpoint must be one of {', '.join(ENDPOINTS)}")
    if asked.completion_window not in WINDOWS:
        raise _invalid("completion_window", f"completion_window must be {' or '.join(WINDOWS)}")
    metadata = asked.metadata or {}
    is_long = any(len(k) > MAX_KEY_CHARS or len(v) > MAX_VALUE_CHARS for k, v in metadata.items())
    if len(metadata) > MAX_METADATA or is_long:
        raise _invalid(
            "metadata",
            f"metadata has at most {MAX_METADATA} keys of {MAX_KEY_CHARS} characters, and texts "
            f"of {MAX_VALUE_CHARS}",
        )


def _invalid(param: str, message: str) -> RequestError:
    return RequestError(message, code="invalid_value", param=param)
