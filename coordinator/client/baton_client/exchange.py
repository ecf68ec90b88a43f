"""Between a call and httpx: what is sent, for how long, how often, and what is made of the answer.

Both clients share it; nothing here waits.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import httpx
import msgspec

from baton_client.calls import Call
from baton_client.errors import (
    BatonAPIError,
    BatonConnectionError,
    ClientError,
    InvalidCall,
    ServerNotFound,
    WaitTimeout,
    api_error,
)

CONNECT_TIMEOUT_S = 5.0
SILENCE_S = 60.0  # of a stream; the server sends a comment much more often
POLL_S = 1.0  # between two looks at a job
JOB_TIMEOUT_S = 86_400.0
DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 600.0
MIN_JITTER = 0.5

Clock = Callable[[], float]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Retry:
    """Only what cannot take effect twice is tried again: reads, and what carries a key.

    Args:
        max_attempts: of one call, with the first.
        first_delay_s: doubled each time, and shortened at random by up to a half.
        max_delay_s: neither backoff nor a server's Retry-After makes it longer.
    """

    max_attempts: int = 3
    first_delay_s: float = 0.25
    max_delay_s: float = 8.0


class Deadline:
    """The time that a call has, from now on.

    Args:
        seconds: all of it.
        what: is being done, for the message of the timeout.
        clock: monotonic seconds.
    """

    def __init__(self, seconds: float, what: str, clock: Clock = time.monotonic) -> None:
        self.started = clock()
        self._clock = clock
        self._seconds = seconds
        self._what = what

    @property
    def left_s(self) -> float:
        return self._seconds - (self._clock() - self.started)

    def check(self) -> None:
        """
        Raises:
            WaitTimeout: it is over.
        """
        if self.left_s <= 0:
            raise self.timeout()

    def timeout(self) -> WaitTimeout:
        return WaitTimeout(f"{self._what}: not done after {self._seconds:.0f} s")


class Attempts:
    """How often a call is tried.

    One that outlives connections, and restarts of the server, gives up a server that has never
    answered; a server that has is waited for until the deadline.

    Args:
        retry: bounds and pauses.
        deadline: of all attempts together.
        is_repeatable: whether to send the call twice has the effect of sending it once.
    """

    def __init__(self, retry: Retry, deadline: Deadline, *, is_repeatable: bool = True) -> None:
        self.deadline = deadline
        self._retry = retry
        self._max_failures = retry.max_attempts if is_repeatable else 1
        self._num_failures = 0  # in a row
        self._has_answered = False

    def answered(self) -> None:
        """The server is there."""
        self._has_answered = True

    def succeeded(self) -> None:
        """Something came of it: the next failure is a first one."""
        self._has_answered = True
        self._num_failures = 0

    def pause_s(self, error: ClientError) -> float:
        """The pause after a failure.

        Raises:
            ClientError: ``error``, which is final.
            WaitTimeout: the time of a call that outlives connections is over.
        """
        self._num_failures += 1
        is_last = self._num_failures >= self._max_failures and not self._has_answered
        if is_last or not error.is_temporary:
            raise error
        retry = self._retry
        pause_s = retry.first_delay_s * 2.0 ** min(self._num_failures - 1, 16)
        pause_s *= random.uniform(MIN_JITTER, 1.0)
        asked_s = error.retry_after if isinstance(error, BatonAPIError) else None
        pause_s = min(retry.max_delay_s, max(pause_s, asked_s or 0.0))
        if pause_s >= self.deadline.left_s:
            raise self.deadline.timeout() if self._has_answered else error
        return pause_s


def check_settings(url: str, api_key: str | None) -> bool:
    """Whether the server's certificate is looked at.

    Raises:
        InvalidCall: not a URL, or not a key.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise InvalidCall(f"{url}: not a URL: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidCall(f"{url}: write a URL such as {DEFAULT_URL}")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise InvalidCall("the API key has characters that no key has")
    return parsed.scheme == "https"


def request_fields(
    call: Call, file: BinaryIO | bytes | None, deadline: Deadline, *, stream: bool
) -> dict[str, Any]:
    """The arguments of httpx's ``build_request`` for a call.

    Raises:
        WaitTimeout: it is too late to send it.
    """
    deadline.check()
    left_s = deadline.left_s
    read_s = min(SILENCE_S, left_s) if stream else left_s
    fields: dict[str, Any] = {
        "method": call.method,
        "url": call.path,
        "params": call.query,
        "headers": dict(call.headers),
        "timeout": httpx.Timeout(left_s, connect=min(CONNECT_TIMEOUT_S, left_s), read=read_s),
    }
    if call.upload is not None:
        upload = call.upload
        fields["data"] = call.form
        fields["files"] = {"file": (upload.filename, file, upload.media_type)}
    elif call.body is not None:
        fields["content"] = msgspec.json.encode(call.body)
        fields["headers"]["content-type"] = "application/json"
    return fields


@contextmanager
def translated(url: str, deadline: Deadline) -> Iterator[None]:
    """What httpx raises, as the client's errors.

    Raises:
        BatonConnectionError: no answer, or half of one.
        WaitTimeout: none in time.
    """
    try:
        yield
    except httpx.ConnectError as error:
        raise ServerNotFound(f"no server at {url}: {error}") from error
    except httpx.TimeoutException as error:
        if deadline.left_s <= 0:
            raise deadline.timeout() from error
        raise BatonConnectionError(f"{url} does not answer") from error
    except (httpx.TransportError, httpx.DecodingError) as error:
        raise BatonConnectionError(f"the connection to {url} broke: {error}") from error


def raise_for_status(response: httpx.Response) -> None:
    """A response that has been read.

    Raises:
        BatonAPIError: it is an error.
    """
    if not response.is_success:
        headers = response.headers
        raise api_error(
            response.status_code,
            response.content,
            headers.get("x-request-id"),
            headers.get("retry-after"),
        )


def decode(response: httpx.Response, kind: type[T]) -> T:
    """The object that a response is.

    Raises:
        BatonConnectionError: it is something else; most likely it is not a Baton that answers.
    """
    try:
        return msgspec.json.decode(response.content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BatonConnectionError(
            f"{response.url} answers with something else: {error}"
        ) from error


def path_and_id(response: httpx.Response) -> tuple[str, str]:
    """What the headers of an answer say of where it came from."""
    return response.headers.get("x-baton-path", ""), response.headers.get("x-request-id", "")
