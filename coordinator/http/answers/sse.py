"""Server-sent events, byte for byte: LF only, one ``data: {json}`` per event, comments in between.

A stream that ends well ends with ``[DONE]``. One that fails ends with an error event and without
it, so that nobody takes half an answer for a whole one.
"""

from typing import Any

import msgspec

from coordinator.errors import error_object
from protocol.errors import RequestError

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
DONE = b"data: [DONE]\n\n"
_ENCODER = msgspec.json.Encoder()


def event(data: dict[str, Any]) -> bytes:
    """One event. JSON escapes every control character, so no text can break the framing."""
    return b"data: " + _ENCODER.encode(data) + b"\n\n"


def error_event(error: RequestError) -> bytes:
    """The last event of a stream that failed."""
    return event(error_object(error))


def keep_alive(progress: tuple[int, int] | None) -> bytes:
    """A comment: every client ignores it, every proxy sees life.

    Args:
        progress: prompt tokens (computed, of all), where that is known.
    """
    if progress is None:
        return b": keep-alive\n\n"
    return f": prefill {progress[0]}/{progress[1]}\n\n".encode()
