"""What every request passes before its route, from the outside in. Pure ASGI.

1. Its turn (loop/turns.py): whoever asks how we are waits for nobody.
2. Its head: count and size of headers, content type and encoding, declared length. Bodies are JSON;
   a few paths take a file as multipart/form-data, which has limits of its own.
3. While there are no keys: its host and origin (connections/origins.py). Then its key (auth.py).
4. The door, which is closed to what asks for work once the server ends.
5. Its body is counted as it comes in; a sender that pauses, or takes too long, is cut off.

Every response carries ``x-request-id``: the caller's if it is plain, else the server's. What is
raised as ``RequestError``, here or further in, becomes OpenAI's error object; whatever else escapes
is a 500.
"""

import asyncio
import logging
import re
import uuid
from dataclasses import dataclass

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.auth import OPEN_PATHS, SCOPE_TENANT, Tenants
from coordinator.config import Limits
from coordinator.errors import error_response, internal_error, shutting_down
from coordinator.http.connections.origins import Origins
from coordinator.loop.timeouts import patient
from coordinator.loop.turns import URGENT_PATHS, Lane, Turns
from protocol.errors import RequestError

SCOPE_REQUEST_ID = "baton.request_id"  # the server's own, never the caller's
SCOPE_CLIENT_REQUEST_ID = "baton.client_request_id"  # what is echoed
SCOPE_IS_UPLOAD = "baton.is_upload"  # the body is a file, and as long as one may be
FILES_PATH = "/v1/files"
UPLOAD_PATHS = frozenset({FILES_PATH, "/v1/documents"})  # a POST to them may be a file
JSON, MULTIPART = b"application/json", b"multipart/form-data"
_WORK = ("POST", "PUT", "PATCH")  # they ask for work, or for something to be kept
_PLAIN_ID = re.compile(rb"[\x21-\x7e]{1,128}")

_log = logging.getLogger(__name__)


class Door:
    """Open, or closed to what is new while what runs may still end.

    A request runs from the moment at which all of its body is here. While the door is closed, every
    POST is refused, and so is one whose body had not come in full; what only looks is answered.
    """

    def __init__(self) -> None:
        self.is_closed = False
        self.num_running = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def close(self) -> None:
        """Let nothing new in. Idempotent."""
        self.is_closed = True

    def check(self) -> None:
        """Raises RequestError once it is closed."""
        if self.is_closed:
            raise shutting_down()

    def enter(self) -> None:
        """One more runs."""
        self.num_running += 1
        self._is_idle.clear()

    def leave(self) -> None:
        """One less."""
        self.num_running -= 1
        if self.num_running == 0:
            self._is_idle.set()

    async def drained(self, grace_s: float, now: asyncio.Event) -> None:
        """Wait until nothing runs any more, for at most ``grace_s`` and until ``now`` is set."""
        if self.num_running == 0:
            return
        _log.info("ending: %d requests may take %.0f s more", self.num_running, grace_s)
        waiting = [asyncio.create_task(event.wait()) for event in (self._is_idle, now)]
        await asyncio.wait(waiting, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        if self.num_running:
            _log.warning("ending: %d requests are cut off", self.num_running)


class Entry:
    """The entry of the application.

    Args:
        app: what lies behind it.
        limits: of heads and bodies.
        origins: of pages that may use a server without keys.
        tenants: whose keys are taken.
        door: may be closed.
        turns: of the running loop.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        origins: Origins,
        tenants: Tenants,
        door: Door,
        turns: Turns,
    ) -> None:
        self._app = app
        self._limits = limits
        self._origins = origins
        self._tenants = tenants
        self._door = door
        self._turns = turns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] not in URGENT_PATHS:
            await self._turns.take(Lane.NEW)
        request_id = scope[SCOPE_REQUEST_ID] = uuid.uuid4().hex
        given = [value for name, value in scope["headers"] if name == b"x-request-id"]
        is_plain = len(given) == 1 and _PLAIN_ID.fullmatch(given[0])
        echoed = given[0] if is_plain else request_id.encode()
        scope[SCOPE_CLIENT_REQUEST_ID] = echoed.decode("ascii")
        response = _Response(send, echoed)
        body: _Body | None = None
        try:
            bounds = self._check(scope)
            body = _Body(receive, bounds, self._door, is_work=scope["method"] in _WORK)
            await self._app(scope, body.receive, response.send)
        except RequestError as error:
            if response.has_started:
                raise
            await response.fail(error)
        except ClientDisconnect:  # in the middle of its body: there is nobody to answer
            _log.info("request %s: its sender has gone", request_id)
        except Exception:  # the outermost frame of a request: the next one is served as ever
            _log.exception("request %s failed by a bug", request_id)
            if response.has_started:
                raise  # the server closes the connection: no clean end for half an answer
            await response.fail(internal_error())
        finally:
            if body is not None and body.has_entered:
                self._door.leave()

    def _check(self, scope: Scope) -> "_BodyBounds":
        bounds = self._check_head(scope)
        if not self._tenants.has_keys:
            self._origins.check(scope["method"], scope["headers"])
        if scope["path"] not in OPEN_PATHS:
            scope[SCOPE_TENANT] = self._tenants.identify(scope["headers"])
        return bounds

    def _check_head(self, scope: Scope) -> "_BodyBounds":
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        size_bytes = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > self._limits.max_headers or size_bytes > self._limits.max_header_bytes:
            raise RequestError(
                "too many or too large headers", code="headers_too_large", status=431
            )
        fields = dict(headers)
        if scope["method"] not in _WORK:
            return _bounds(self._limits, is_upload=False)
        if fields.get(b"content-encoding", b"identity").lower() != b"identity":
            raise RequestError(
                "compressed bodies are not accepted", code="unsupported_encoding", status=415
            )
        scope[SCOPE_IS_UPLOAD] = is_upload = _is_upload(scope, fields)
        bounds = _bounds(self._limits, is_upload=is_upload)
        if int(fields.get(b"content-length", b"0")) > bounds.max_bytes:
            raise _too_large(bounds)
        return bounds


@dataclass(frozen=True, slots=True)
class _BodyBounds:
    """What one body may be."""

    max_bytes: int
    timeout_s: float
    idle_timeout_s: float


def _bounds(limits: Limits, *, is_upload: bool) -> _BodyBounds:
    return _BodyBounds(
        limits.max_upload_bytes if is_upload else limits.max_body_bytes,
        limits.upload_timeout_s if is_upload else limits.body_timeout_s,
        limits.body_idle_timeout_s,
    )


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


def _too_large(bounds: _BodyBounds) -> RequestError:
    return RequestError(
        f"the body is larger than {bounds.max_bytes} bytes", code="body_too_large", status=413
    )


class _Body:
    """Counts and times a body; after its end it waits for the disconnect, for however long.

    A request enters the door with the end of its body; one that asks for no work, at once.
    """

    def __init__(self, receive: Receive, bounds: _BodyBounds, door: Door, *, is_work: bool) -> None:
        self.has_entered = False
        self._receive = receive
        self._bounds = bounds
        self._door = door
        self._num_bytes = 0
        self._is_read = False
        self._left_s = bounds.timeout_s
        if is_work:
            door.check()
        else:
            self._enter()

    def _enter(self) -> None:
        if not self.has_entered:
            self.has_entered = True
            self._door.enter()

    async def receive(self) -> Message:
        if self._is_read:
            return await self._receive()
        try:
            async with patient(min(self._bounds.idle_timeout_s, self._left_s)) as limit:
                message = await self._receive()
        except TimeoutError as error:
            raise RequestError(
                "the body did not arrive in time", code="body_timeout", status=408
            ) from error
        self._left_s -= limit.spent_s
        if message["type"] != "http.request":
            self._is_read = True
            return message
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._bounds.max_bytes:
            raise _too_large(self._bounds)
        if not message.get("more_body", False):
            self._is_read = True
            if not self.has_entered:
                self._door.check()
                self._enter()
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
            headers = [*message.get("headers", []), (b"x-request-id", self._request_id)]
            message = {**message, "headers": headers}
        await self._send(message)

    async def fail(self, error: RequestError) -> None:
        status, headers, body = error_response(error)
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})
