"""A document's events as server-sent events: those that were, then those that come.

Each carries its number, so a reader who was cut off goes on with ``starting_after``, also after a
restart of the server. The stream ends with ``[DONE]`` when nothing more is done for the document.
"""

import asyncio
import contextlib

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from coordinator.config import CoordinatorConfig
from coordinator.errors import shutting_down
from coordinator.http.answers import sse
from coordinator.http.connections.connection import SCOPE_ABORT
from coordinator.jobs.documents.document import Document
from coordinator.jobs.engine.engine import Engine
from coordinator.jobs.engine.table import WrittenEvent
from coordinator.loop.timeouts import patient


class EventStream(Response):
    """One reader's stream, as Starlette calls it. Used once.

    Args:
        engine: of the documents.
        config: how long to wait for a reader, and to be silent.
        document: which is the reader's.
        starting_after: number of the last event that the reader has.
    """

    def __init__(
        self,
        engine: Engine[Document],
        config: CoordinatorConfig,
        document: Document,
        starting_after: int,
    ) -> None:
        super().__init__()
        self._engine = engine
        self._config = config
        self._document_id = document.id
        self._tenant = document.tenant
        self._last = starting_after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._stream(send))
        watcher = asyncio.create_task(_until_disconnect(receive))
        try:
            with self._engine.watchers.watching(self._tenant):
                await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, watcher):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await work
        except TimeoutError:  # the reader takes nothing
            abort = scope.get(SCOPE_ABORT)
            if abort is not None:
                abort()

    async def _stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": sse.HEADERS})
        while True:
            if self._engine.table.changes.is_closed:  # no [DONE]: there may be more to come
                await self._send(send, sse.error_event(shutting_down()), is_last=True)
                return
            news = self._engine.table.changes.ticket(self._document_id)
            events, may_come = await self._engine.events(self._document_id, self._last)
            if events:
                self._last = events[-1].sequence
                await self._send(send, b"".join(map(self._frame, events)))
            elif not may_come:
                await self._send(send, sse.DONE, is_last=True)
                return
            else:
                await self._await(news, send)

    async def _await(self, news: asyncio.Event, send: Send) -> None:
        try:
            async with asyncio.timeout(self._config.keep_alive_s):
                await news.wait()
        except TimeoutError:
            await self._send(send, sse.keep_alive(None))

    def _frame(self, event: WrittenEvent) -> bytes:
        data = sse.event(
            {
                "type": event.kind,
                "sequence_number": event.sequence,
                "document_id": self._document_id,
                "created_at": round(event.at, 3),
                **event.data,
            }
        )
        return f"id: {event.sequence}\nevent: {event.kind}\n".encode() + data

    async def _send(self, send: Send, body: bytes, *, is_last: bool = False) -> None:
        async with patient(self._config.send_timeout_s):
            await send({"type": "http.response.body", "body": body, "more_body": not is_last})


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
