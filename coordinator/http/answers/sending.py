"""A long body of an answer, sent piece by piece: others run in between, slow readers hold it up."""

from collections.abc import Iterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PIECE_BYTES = 256 << 10


def body_messages(body: bytes | memoryview) -> Iterator[dict[str, Any]]:
    """The messages that send ``body``, whose length the headers have said."""
    view = memoryview(body)
    for start in range(0, max(1, len(view)), PIECE_BYTES):
        piece = bytes(view[start : start + PIECE_BYTES])
        more = start + PIECE_BYTES < len(view)
        yield {"type": "http.response.body", "body": piece, "more_body": more}


class JsonBody(Response):
    """JSON that has been made already."""

    def __init__(self, body: bytes | memoryview) -> None:
        super().__init__()
        self._json = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(self._json)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for message in body_messages(self._json):
            await send(message)
