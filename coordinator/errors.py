"""How a failure looks to an HTTP caller: OpenAI's error object, with a string code.

A ``RequestError`` carries its status, code and parameter. Whatever else goes wrong is a 500 that
says nothing of our insides; its trace is in the log under the request's id.
"""

from typing import Any

import msgspec

from protocol.errors import RequestError

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    409: "conflict_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
    507: "server_error",
}
RETRY_AFTER_S = 1  # of what is expected to pass soon, and cannot be worked out

# What a pool may say of a request, and the status that carries it. Any other code is our fault.
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


def error_object(error: RequestError) -> dict[str, Any]:
    """The body of an error response, and of an error frame in a stream."""
    kind = ERROR_TYPES.get(error.status, "invalid_request_error")
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: RequestError) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """(status, headers, body) of an error that is told before anything else was."""
    body = msgspec.json.encode(error_object(error))
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if error.status in (429, 503):
        retry_after_s = error.retry_after_s or RETRY_AFTER_S
        headers.append((b"retry-after", str(retry_after_s).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.status in (408, 413, 431):
        headers.append((b"connection", b"close"))  # what is left of the body is not read
    return error.status, headers, body


def pool_failure(code: str, message: str) -> RequestError:
    """What a pool said about a request that it cannot go on with."""
    return RequestError(message, code=code, status=STATUS_BY_CODE.get(code, 500))


def no_workers(role: str) -> RequestError:
    """No pool of that role can take a request now."""
    return RequestError(f"no {role} pool serves at the moment", code="no_workers", status=503)


def quarantined() -> RequestError:
    """Pools have died while they computed this very request, and of no other that was there."""
    return RequestError(
        "this request is refused: pools that computed it have died, more than once",
        code="request_quarantined",
        status=500,
    )


def invalid_value(param: str, message: str, code: str = "invalid_value") -> RequestError:
    """A field, or a part of a query, has a value that it cannot have."""
    return RequestError(message, code=code, param=param)


def unsupported(param: str, message: str) -> RequestError:
    """A field, or a value of it, is not served here."""
    return invalid_value(param, message, "unsupported_parameter")


def internal_error() -> RequestError:
    """A bug of ours; the details are in the log."""
    return RequestError("internal error", code="internal_error", status=500)


def shutting_down() -> RequestError:
    """The cluster ends; another one may take the request."""
    return RequestError("the server is shutting down", code="shutting_down", status=503)
