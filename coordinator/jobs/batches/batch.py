"""A batch and its lines, as they are kept, and as callers see them. Pure.

Of a line the database has the place in the input file, not the text; of an answered one, the line
that will be written.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from coordinator.jobs.batches.states import ENDED, OPEN, RUNNING, TABLE, WRITING, BatchState
from coordinator.jobs.engine.job import Job

DOCUMENTS = "/v1/documents"
ENDPOINTS = ("/v1/completions", "/v1/chat/completions", DOCUMENTS)
# What OpenAI's clients do not know, and see as something else.
SHOWN = {BatchState.EXPIRING: BatchState.FINALIZING, BatchState.SET_ASIDE: BatchState.FAILED}


class LineError(msgspec.Struct, frozen=True):
    """Why a batch was refused; ``line`` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Usage(msgspec.Struct, frozen=True):
    """Tokens of all answers."""

    num_input_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0

    def plus(self, other: "Usage") -> "Usage":
        return Usage(
            num_input_tokens=self.num_input_tokens + other.num_input_tokens,
            num_cached_tokens=self.num_cached_tokens + other.num_cached_tokens,
            num_output_tokens=self.num_output_tokens + other.num_output_tokens,
        )


class Batch(Job, frozen=True, omit_defaults=True, kw_only=True):
    """A batch. The files get their ids at the start, so that a second attempt at writing one, after
    a crash, replaces what the first has left.
    """

    KIND: ClassVar[str] = "batch"
    TABLE: ClassVar[Mapping[Any, Any]] = TABLE
    PENDING: ClassVar[frozenset[Any]] = OPEN
    BEGUN: ClassVar[frozenset[Any]] = frozenset()  # it goes on in the state in which it is
    CANCELLED: ClassVar[frozenset[Any]] = frozenset({BatchState.CANCELLING, BatchState.CANCELLED})
    CLEANED: ClassVar[frozenset[Any]] = ENDED

    state: BatchState = BatchState.VALIDATING
    model: str
    endpoint: str
    input_file_id: str
    completion_window: str
    expires_at: int
    keep_until: int  # when it is forgotten
    output_file_id: str
    error_file_id: str
    output_ttl_s: int
    metadata: dict[str, str] | None = None
    num_lines: int = 0
    num_completed: int = 0
    num_failed: int = 0
    usage: Usage = Usage()
    errors: tuple[LineError, ...] = ()  # of its input
    has_output: bool = False  # whether the files have been written, and have lines
    has_errors: bool = False

    @property
    def due_at(self) -> float | None:
        if self.state in WRITING:
            return None
        return self.expires_at if self.state in RUNNING else self.keep_until


class Line(msgspec.Struct, frozen=True):
    """One request of a batch: ``number`` counts from 1, ``offset`` and ``size`` in bytes."""

    number: int
    offset: int
    size: int
    custom_id: str
    url: str
    depends_on: int | None = None  # the line that makes the document that this one names


class LineEdit(msgspec.Struct, frozen=True):
    """What is put into the request of a line when its turn has come."""

    document_id: str | None  # of the document that it names by a line
    idempotency_key: str | None = None  # if it has none of its own


class Claim(msgspec.Struct, frozen=True):
    """A line to be answered now."""

    line: Line
    document_id: str | None = None  # what the line that it depends on has made; None: it failed


class Result(msgspec.Struct, frozen=True):
    """An answer, as it is kept until the files are written."""

    text: bytes  # the line of the output file
    is_error: bool
    usage: Usage = Usage()
    document_id: str | None = None


def describe_batch(batch: Batch) -> dict[str, Any]:
    """A batch as callers see it, in OpenAI's shape."""
    usage = batch.usage
    errors = [msgspec.structs.asdict(error) for error in batch.errors]
    if batch.error is not None:
        errors.append(msgspec.structs.asdict(LineError(batch.error.code, batch.error.message)))
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": SHOWN.get(batch.state, batch.state).value,
        "output_file_id": batch.output_file_id if batch.has_output else None,
        "error_file_id": batch.error_file_id if batch.has_errors else None,
        "created_at": int(batch.created_at),
        "expires_at": batch.expires_at,
        **_times(batch),
        "request_counts": {
            "total": batch.num_lines,
            "completed": batch.num_completed,
            "failed": batch.num_failed,
        },
        "usage": {
            "input_tokens": usage.num_input_tokens,
            "input_tokens_details": {"cached_tokens": usage.num_cached_tokens},
            "output_tokens": usage.num_output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.num_input_tokens + usage.num_output_tokens,
        },
        "metadata": batch.metadata,
    }


def _times(batch: Batch) -> dict[str, int | None]:
    """When each state was entered that callers know, in OpenAI's order."""
    times: dict[str, int | None] = {}
    for state in BatchState:
        if state is BatchState.VALIDATING or state in SHOWN:
            continue  # created_at has the first one
        hidden = [other for other, shown in SHOWN.items() if shown is state]
        found = [batch.times[s.value] for s in (state, *hidden) if s.value in batch.times]
        times[f"{state.value}_at"] = int(found[0]) if found else None
    return times


def answered(
    batch: Batch, line: Line, reply: tuple[int, dict[str, Any]], request_id: str
) -> Result:
    """What is kept of the answer to a line: status and body, as HTTP would have had them."""
    status, body = reply
    is_error = status >= 400
    response = {"status_code": status, "request_id": request_id, "body": body}
    made = body.get("id") if line.url == DOCUMENTS and not is_error else None
    return Result(
        text=_text(batch, line.number, line.custom_id, response, None),
        is_error=is_error,
        usage=Usage() if is_error else _usage(body),
        document_id=made if isinstance(made, str) else None,
    )


def unanswered(batch: Batch, number: int, custom_id: str) -> bytes:
    """The line of the error file for a request that was not answered before the end."""
    what = "expired" if batch.state is BatchState.EXPIRING else "cancelled"
    error = {
        "code": f"batch_{what}",
        "message": f"the batch was {what} before this request was answered",
    }
    return _text(batch, number, custom_id, None, error)


def _text(
    batch: Batch,
    number: int,
    custom_id: str,
    response: dict[str, Any] | None,
    error: dict[str, Any] | None,
) -> bytes:
    # The same line has the same id, however often it is run.
    line_id = f"batch_req_{batch.id.removeprefix('batch_')}_{number}"
    return msgspec.json.encode(
        {"id": line_id, "custom_id": custom_id, "response": response, "error": error}
    )


def _usage(body: dict[str, Any]) -> Usage:
    usage = body.get("usage")
    if not isinstance(usage, dict) or "prompt_tokens" not in usage:
        return Usage()
    details = usage.get("prompt_tokens_details") or {}
    return Usage(
        num_input_tokens=usage["prompt_tokens"],
        num_cached_tokens=details.get("cached_tokens", 0),
        num_output_tokens=usage["completion_tokens"],
    )
