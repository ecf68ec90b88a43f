"""What can go wrong between a client and its server, split by what the caller can do about it.

ClientError
|-- InvalidCall           the call itself is wrong: nothing was sent
|-- BatonAPIError         the server's answer is an error
|-- BatonConnectionError  there is no answer, or it broke off
|   `-- ServerNotFound    nobody listens there
|-- WaitTimeout           the caller's own time is over; the job goes on
`-- JobFailed             a document or a batch has ended without a result
"""

from typing import Generic, TypeVar

import msgspec

MAX_SHOWN_CHARS = 300  # of a body that is not Baton's, such as a proxy's
RETRIED_STATUS = frozenset({408, 429, 502, 503, 504})
# The status that an error code stands for where no HTTP status tells it, in a stream; else 500.
# A copy of the server's table (coordinator/errors.py), which a test compares with it.
STATUS_BY_CODE = {
    "kv_capacity_exceeded": 400,
    "context_length_exceeded": 400,
    "invalid_request": 400,
    "overloaded": 503,
    "worker_lost": 503,
    "handoff_failed": 503,
    "stale_target": 503,
    "stalled": 503,
    "insufficient_storage": 507,
    "no_workers": 503,
    "no_token_left": 400,
    "shutting_down": 503,
}

JobT = TypeVar("JobT")


class ErrorInfo(msgspec.Struct, frozen=True):
    """An error object, as responses, events and jobs carry it. Some servers number their codes."""

    message: str = ""
    code: str | int | None = None
    param: str | None = None
    type: str | None = None
    status: int | None = None


class _ErrorBody(msgspec.Struct, frozen=True):
    """The body of an error response."""

    error: ErrorInfo


class ClientError(Exception):
    """The root: catches everything that the client raises on purpose."""

    is_temporary = False
    """Whether the same call may well succeed later."""


class InvalidCall(ClientError, ValueError):
    """An argument that no server could make sense of."""


class BatonAPIError(ClientError):
    """The server refused a request, or failed at it.

    Args:
        status: the HTTP status; of a stream that failed, the one that its code stands for.
        info: what the server said.
        request_id: the server's log has more under it.
        retry_after: seconds after which the server takes it again, if it said so.
    """

    def __init__(
        self,
        status: int,
        info: ErrorInfo,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(info.message)
        self.status = status
        self.code = str(info.code or "")
        self.param = info.param
        self.message = info.message
        self.request_id = request_id
        self.retry_after = retry_after
        self.is_temporary = status in RETRIED_STATUS

    def __str__(self) -> str:
        return f"{self.message} ({self.status} {self.code})".replace(" )", ")")


class BatonConnectionError(ClientError):
    """No server, or one that did not finish its answer."""

    is_temporary = True


class ServerNotFound(BatonConnectionError):
    """Nobody listens there."""


class WaitTimeout(ClientError, TimeoutError):
    """The time of a call is over."""


class JobFailed(ClientError, Generic[JobT]):
    """A job has ended, and not well; ``job`` is how it stands, with whatever it has."""

    def __init__(self, message: str, job: JobT) -> None:
        super().__init__(message)
        self.job = job


def api_error(
    status: int, body: bytes, request_id: str | None, retry_after: str | None
) -> BatonAPIError:
    """The error that a response is; its body may be anything."""
    try:
        info = msgspec.json.decode(body, type=_ErrorBody).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        shown = " ".join(body.decode("utf-8", "replace").split())[:MAX_SHOWN_CHARS]
        info = ErrorInfo(shown or "an error without a word")
    # The other form of Retry-After, a date, is of no use here.
    is_number = retry_after is not None and retry_after.isascii() and retry_after.isdigit()
    return BatonAPIError(status, info, request_id, float(retry_after or 0) if is_number else None)


def stream_error(info: ErrorInfo | str, request_id: str | None = None) -> BatonAPIError:
    """The error that ends a stream; its status is gone, its code is not."""
    if isinstance(info, str):
        info = ErrorInfo(info)
    return BatonAPIError(STATUS_BY_CODE.get(str(info.code), 500), info, request_id)
