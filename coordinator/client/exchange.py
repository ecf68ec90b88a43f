"""Between a call and httpx: what is sent, what is made of the answer. Shared by both clients."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, BinaryIO, TypeVar

import httpx
import msgspec

from coordinator.client.budget import Budget, Retry
from coordinator.client.errors import BatonConnectionError, JobFailed, api_error
from coordinator.client.requests import Call
from coordinator.client.types import Batch, ChatCompletion, Completion, Document
from protocol.errors import ConfigError

CONNECT_TIMEOUT_S = 5.0
SILENCE_S = 60.0  # of a stream; the server sends a comment much more often
POLL_S = 1.0  # between two looks at a job
JOB_TIMEOUT_S = 86_400.0
DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 600.0

T = TypeVar("T")
AnswerT = TypeVar("AnswerT", Completion, ChatCompletion)


@dataclass(frozen=True, slots=True)
class Settings:
    """Of a client.

    Args:
        url: of the server.
        api_key: the tenant's, if the server asks for one.
        timeout_s: of each call, with all of its attempts; waits have their own.
        poll_s: between two looks at a job.
        retry: when a call is tried again.
        random: shortens the pauses.
    """

    url: str
    api_key: str | None
    timeout_s: float
    poll_s: float
    retry: Retry
    random: Random = field(default_factory=Random)

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{self.url}: not a URL: {error}") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(f"{self.url}: write a URL such as {DEFAULT_URL}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError("the API key has characters that no key has")

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}

    @property
    def base_url(self) -> str:
        return self.url.rstrip("/")

    @property
    def is_secure(self) -> bool:
        """Certificates are of use; else the system's need not be loaded, which takes a while."""
        return httpx.URL(self.url).scheme == "https"

    def budget(self, call: Call, timeout_s: float | None) -> Budget:
        seconds = self.timeout_s if timeout_s is None else timeout_s
        return Budget(seconds, f"{call.method} {call.path}")


def request_fields(call: Call, file: BinaryIO | bytes | None, budget: Budget) -> dict[str, Any]:
    """The arguments of httpx's ``build_request`` for a call."""
    budget.check()
    left_s = budget.left_s
    fields: dict[str, Any] = {
        "method": call.method,
        "url": call.path,
        "params": call.query,
        "headers": dict(call.headers),
        "timeout": httpx.Timeout(left_s, connect=min(CONNECT_TIMEOUT_S, left_s)),
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
def translated(url: str, budget: Budget) -> Iterator[None]:
    """What httpx raises, as ours.

    Raises:
        BatonConnectionError: no answer, or half of one.
        WaitTimeout: none within the budget.
    """
    try:
        yield
    except httpx.ConnectError as error:
        raise BatonConnectionError(f"no server at {url}: {error}") from error
    except httpx.TimeoutException as error:
        if budget.left_s <= 0:
            raise budget.timeout() from error
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


def decode_answer(response: httpx.Response, kind: type[AnswerT]) -> AnswerT:
    """A whole answer, with what its headers say."""
    path, request_id = path_and_id(response)
    return msgspec.structs.replace(decode(response, kind), path=path, request_id=request_id)


def path_and_id(response: httpx.Response) -> tuple[str, str]:
    """What the headers of an answer say of where it came from."""
    headers = response.headers
    return headers.get("x-baton-path", ""), headers.get("x-request-id", "")


def check_document(document: Document) -> Document:
    """
    Raises:
        JobFailed: it has ended, and cannot be asked about.
    """
    if not document.is_usable:
        why = f": {document.error.message}" if document.error is not None else ""
        raise JobFailed(f"{document.id} is {document.status}{why}", document)
    return document


def check_batch(batch: Batch) -> Batch:
    """
    Raises:
        JobFailed: it has ended before its time; its files have what was done.
    """
    if batch.status != "completed":
        first = batch.errors.data[0].message if batch.errors and batch.errors.data else ""
        raise JobFailed(f"{batch.id} is {batch.status}" + (f": {first}" if first else ""), batch)
    return batch
