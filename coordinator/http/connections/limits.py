"""What a connection may do to us before a request is understood. Pure ASGI, outermost but for ids.

1. Header count and size, the content type and encoding, and the declared length are checked first.
   Bodies are JSON; a few paths take a file as multipart/form-data, which has limits of its own.
2. The body is counted as it comes in; a sender that pauses, or takes too long, is cut off.
3. Every response carries ``x-request-id``: the caller's if it is plain, else the server's.
"""

import logging
import re
import uuid
from dataclasses import dataclass

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.config import Limits
from coordinator.errors import error_response, internal_error
from coordinator.loop.timeouts import patient
from protocol.errors import RequestError

SCOPE_REQUEST_ID = "baton.request_id"  # the server's own, never the caller's
SCOPE_CLIENT_REQUEST_ID = "baton.client_request_id"  # what is echoed
SCOPE_IS_UPLOAD = "baton.is_upload"  # the body is a file, and as long as one may be
FILES_PATH = "/v1/files"
UPLOAD_PATHS = frozenset({FILES_PATH, "/v1/documents"})  # a POST to them may be a file
JSON, MULTIPART = b"application/json", b"multipart/form-data"
_PLAIN_ID = re.compile(rb"[\x21-\x7e]{1,128}")

_log = logging.getLogger(__name__)


class LimitsMiddleware:
    """Refuses oversized, slow and oddly typed requests; turns whatever escapes into a 500."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        given = [value for name, value in scope["headers"] if name == b"x-request-id"]
        is_plain = len(given) == 1 and _PLAIN_ID.fullmatch(given[0])
        echoed = given[0] if is_plain else request_id.encode()
        scope[SCOPE_REQUEST_ID] = request_id
        scope[SCOPE_CLIENT_REQUEST_ID] = echoed.decode("ascii")
        response = _Response(send, echoed)
        try:
            terms = self._check_head(scope)
            await self._app(scope, _BodyReader(receive, terms).receive, response.send)
        except RequestError as error:
            await response.fail(error)
        except ClientDisconnect:  # in the middle of its body: there is nobody to answer
            _log.info("request %s: its sender has gone", request_id)
        except Exception:  # the outermost frame of a request: the next one is served as ever
            _log.exception("request %s failed by a bug", request_id)
            if response.has_started:
                raise  # the server closes the connection: no clean end for half an answer
            await response.fail(internal_error())

    def _check_head(self, scope: Scope) -> "_BodyTerms":
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        size_bytes = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > self._limits.max_headers or size_bytes > self._limits.max_header_bytes:
            raise RequestError(
                "too many or too large headers", code="headers_too_large", status=431
            )
        fields = dict(headers)
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return _terms(self._limits, is_upload=False)
        if fields.get(b"content-encoding", b"identity").lower() != b"identity":
            raise RequestError(
                "compressed bodies are not accepted", code="unsupported_encoding", status=415
            )
        scope[SCOPE_IS_UPLOAD] = is_upload = _is_upload(scope, fields)
        terms = _terms(self._limits, is_upload=is_upload)
        if int(fields.get(b"content-length", b"0")) > terms.max_bytes:
            raise _too_large(terms)
        return terms


@dataclass(frozen=True, slots=True)
class _BodyTerms:
    """What one body may be."""

    max_bytes: int
    timeout_s: float
    idle_timeout_s: float


def _terms(limits: Limits, *, is_upload: bool) -> _BodyTerms:
    if is_upload:
        return _BodyTerms(
            limits.max_upload_bytes, limits.upload_timeout_s, limits.body_idle_timeout_s
        )
    return _BodyTerms(limits.max_body_bytes, limits.body_timeout_s, limits.body_idle_timeout_s)


def _is_upload(scope: Scope, fields: dict[bytes, bytes]) -> bool:
    """Whether a body is a file; what is neither that nor JSON is refused."""
    media_type = fields.get(b"content-type", b"").split(b";")[0].strip().lower()
    is_post = scope["method"] == "POST"
    if is_post and scope["path"] in UPLOAD_PATHS and media_type == MULTIPART:
        return True
    wanted = MULTIPART if is_post and scope["path"] == FILES_PATH else JSON
    has_body = b"transfer-encoding" in fields or fields.get(b"content-length", b"0") != b"0"
    if media_type == wanted == JSON or not (has_body or media_type):
        return False
    raise RequestError(
        f"send the body as Content-Type: {wanted.decode()}",
        code="unsupported_media_type",
        status=415,
    )


def _too_large(terms: _BodyTerms) -> RequestError:
    return RequestError(
        f"the body is larger than {terms.max_bytes} bytes", code="body_too_large", status=413
    )


class _BodyReader:
    """Counts and times the body; after its end it waits for the disconnect, for however long."""

    def __init__(self, receive: Receive, terms: _BodyTerms) -> None:
        self._receive = receive
        self._terms = terms
        self._num_bytes = 0
        self._is_read = False
        self._left_s = terms.timeout_s

    async def receive(self) -> Message:
        if self._is_read:
            return await self._receive()
        try:
            async with patient(min(self._terms.idle_timeout_s, self._left_s)) as limit:
                message = await self._receive()
        except TimeoutError as error:
            raise RequestError(
                "the body did not arrive in time", code="body_timeout", status=408
            ) from error
        self._left_s -= limit.spent_s
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            if self._num_bytes > self._terms.max_bytes:
                raise _too_large(self._terms)
            self._is_read = not message.get("more_body", False)
        else:
            self._is_read = True
        return message


class _Response:
    """Adds the request's id to the response, and knows whether it has begun."""

    def __init__(self, send: Send, request_id: bytes) -> None:
        self._send = send
        self._request_id = request_id
        self.has_started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_started = True
            message = {
                **message,
                "headers": [*message.get("headers", []), (b"x-request-id", self._request_id)],
            }
        await self._send(message)

    async def fail(self, error: RequestError) -> None:
        status, headers, body = error_response(error)
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})
