"""What can go wrong between a client and its server, split by what the caller can do about it.

ClientError (a BatonError)
|-- BatonAPIError         the server's answer is an error
|-- BatonConnectionError  there is no answer, or it broke off
|-- WaitTimeout           the caller's own budget is spent; the job goes on
`-- JobFailed             a document or a batch has ended without a result
"""

from typing import Generic, TypeVar

import msgspec

from coordinator.errors import STATUS_BY_CODE
from protocol.errors import BatonError

RETRIED_STATUS = frozenset({408, 429, 502, 503, 504})
MAX_SHOWN_CHARS = 300  # of a body that is not ours, such as a proxy's

JobT = TypeVar("JobT")


class ErrorInfo(msgspec.Struct, frozen=True):
    """An error object, as responses, stream frames and jobs carry it."""

    message: str = ""
    code: str | None = None
    param: str | None = None
    type: str | None = None
    status: int | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of an error response, and an error frame of a stream."""

    error: ErrorInfo


class ClientError(BatonError):
    """The root: catches everything that the client raises on purpose."""


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
        self.code = info.code or ""
        self.param = info.param
        self.message = info.message
        self.request_id = request_id
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.message} ({self.status} {self.code})".replace(" )", ")")

    @property
    def is_temporary(self) -> bool:
        """The same request may well succeed later."""
        return self.status in RETRIED_STATUS


class BatonConnectionError(ClientError):
    """No server, or one that did not finish its answer."""


class WaitTimeout(ClientError, TimeoutError):
    """The budget of a call is spent."""


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
        info = msgspec.json.decode(body, type=ErrorBody).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        shown = " ".join(body.decode("utf-8", "replace").split())[:MAX_SHOWN_CHARS]
        info = ErrorInfo(shown or "an error without a word")
    return BatonAPIError(status, info, request_id, _seconds(retry_after))


def stream_error(info: ErrorInfo, request_id: str | None) -> BatonAPIError:
    """The error that ends a stream; its status is gone, its code is not."""
    return BatonAPIError(STATUS_BY_CODE.get(info.code or "", 500), info, request_id)


def _seconds(text: str | None) -> float | None:
    """A Retry-After header; its other form, a date, is nothing to us."""
    return float(text) if text is not None and text.isascii() and text.isdigit() else None
