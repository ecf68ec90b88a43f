"""Calls and streams on an event loop; sync_sender.py with ``await``."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, aclosing
from types import TracebackType
from typing import Generic, Self

import httpx

from coordinator.client.budget import Budget, Patience
from coordinator.client.errors import BatonAPIError, BatonConnectionError
from coordinator.client.exchange import (
    SILENCE_S,
    Settings,
    T,
    decode,
    path_and_id,
    raise_for_status,
    request_fields,
    translated,
)
from coordinator.client.following import Following
from coordinator.client.reading import ChunkT, Outcome, Reading
from coordinator.client.requests import Call
from coordinator.client.types import ChatChunk, DocumentEvent

AsyncGet = Callable[[Budget], Awaitable[T]]


class AsyncSender:
    """Sends calls.

    Args:
        settings: the server, the key, the budgets.
        transport: in place of the network.
    """

    def __init__(self, settings: Settings, transport: httpx.AsyncBaseTransport | None) -> None:
        self.settings = settings
        self._http = httpx.AsyncClient(
            base_url=settings.base_url,
            headers=settings.headers,
            transport=transport,
            trust_env=False,
            verify=settings.is_secure,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def call(self, call: Call, kind: type[T], timeout_s: float | None = None) -> T:
        """The object that a call answers with.

        Raises:
            ClientError: there is none.
        """
        return decode(await self.exchange(call, timeout_s), kind)

    async def exchange(self, call: Call, timeout_s: float | None = None) -> httpx.Response:
        """A whole response; a call that may be repeated is, if that can help."""
        budget, retry = self.settings.budget(call, timeout_s), self.settings.retry
        number = 0
        while True:
            number += 1
            try:
                return await self.once(call, budget)
            except (BatonAPIError, BatonConnectionError) as error:
                delay = retry.delay_s(number, error, self.settings.random)
                if not call.is_repeatable or delay is None or delay >= budget.left_s:
                    raise
                await asyncio.sleep(delay)

    async def once(self, call: Call, budget: Budget) -> httpx.Response:
        """A whole response, of one attempt."""
        response = await self._send(call, budget, stream=False)
        raise_for_status(response)
        return response

    async def open(self, call: Call, budget: Budget) -> httpx.Response:
        """A response whose body is still to come; whoever called closes it."""
        response = await self._send(call, budget, stream=True)
        if not response.is_success:
            async with aclosing(response):
                with translated(self.settings.url, budget):
                    await response.aread()
            raise_for_status(response)
        return response

    async def _send(self, call: Call, budget: Budget, *, stream: bool) -> httpx.Response:
        with ExitStack() as stack:
            file = stack.enter_context(call.upload.open()) if call.upload is not None else None
            request = self._http.build_request(**request_fields(call, file, budget))
            if stream:
                timeouts = request.extensions["timeout"]
                timeouts["read"] = min(SILENCE_S, timeouts["read"])
            stack.enter_context(translated(self.settings.url, budget))
            try:
                async with asyncio.timeout(budget.left_s):
                    return await self._http.send(request, stream=stream)
            except TimeoutError as error:
                raise budget.timeout() from error

    async def stream(
        self, call: Call, reading: Reading[ChunkT], budget: Budget
    ) -> "AsyncStream[ChunkT]":
        """A streamed answer, once its headers are there."""
        response = await self.open(call, budget)
        path, request_id = path_and_id(response)
        reading.begin(request_id, path)
        return AsyncStream(response, reading, self.settings.url, budget)

    async def follow(
        self, following: Following, patience: Patience
    ) -> AsyncIterator[DocumentEvent]:
        """Events, over as many connections as it takes."""
        while not following.is_over:
            try:
                async for event in self._follow_once(following, patience):
                    yield event
            except (BatonAPIError, BatonConnectionError) as error:
                await asyncio.sleep(patience.delay_s(error))

    async def _follow_once(
        self, following: Following, patience: Patience
    ) -> AsyncIterator[DocumentEvent]:
        budget = patience.budget
        response = await self.open(following.call(), budget)
        patience.answered()
        async with aclosing(response):
            with translated(self.settings.url, budget):
                async for data in response.aiter_bytes():
                    budget.check()
                    for event in following.feed(data):
                        patience.got_on()
                        yield event
                    if following.is_over:
                        return
        raise BatonConnectionError("the events broke off")

    async def wait(
        self,
        get: AsyncGet[T],
        is_pending: Callable[[T], bool],
        on_progress: Callable[[T], object] | None,
        budget: Budget,
    ) -> T:
        """A job that has ended; looked at again and again.

        Raises:
            WaitTimeout: it has not ended in time, and goes on.
            ClientError: it cannot be looked at.
        """
        patience = Patience(self.settings.retry, budget, self.settings.random)
        while True:
            budget.check()
            looked = budget.clock()
            try:
                job = await get(budget)
            except (BatonAPIError, BatonConnectionError) as error:
                await asyncio.sleep(patience.delay_s(error))
                continue
            patience.got_on()
            if on_progress is not None:
                on_progress(job)
            if not is_pending(job):
                return job
            pause = self.settings.poll_s - (budget.clock() - looked)
            await asyncio.sleep(max(0.0, min(pause, budget.left_s)))


class AsyncStream(Generic[ChunkT]):
    """An answer that is coming in. Iterate over it once; leaving it ends it on the server too."""

    def __init__(
        self, response: httpx.Response, reading: Reading[ChunkT], url: str, budget: Budget
    ) -> None:
        self._response = response
        self._reading: Reading[ChunkT] = reading
        self._url = url
        self._budget = budget
        self._chunks: AsyncIterator[ChunkT] = self._read()

    async def _read(self) -> AsyncIterator[ChunkT]:
        async with aclosing(self._response):
            with translated(self._url, self._budget):
                async for data in self._response.aiter_bytes():
                    self._budget.check()
                    for chunk in self._reading.feed(data):
                        yield chunk
                    if self._reading.is_done:
                        return
                self._reading.end()

    def __aiter__(self) -> AsyncIterator[ChunkT]:
        return self._chunks

    @property
    def outcome(self) -> Outcome:
        """What came with the text; complete when the iteration is over."""
        return self._reading.outcome

    async def close(self) -> None:
        await self._response.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncAnswer:
    """A streamed answer to a question, as text."""

    def __init__(self, stream: AsyncStream[ChatChunk]) -> None:
        self._stream = stream

    def __aiter__(self) -> AsyncIterator[str]:
        return self._texts()

    async def _texts(self) -> AsyncIterator[str]:
        async for chunk in self._stream:
            if chunk.text:
                yield chunk.text

    async def read(self) -> str:
        """What is left of the text, all of it if nothing has been read."""
        return "".join([text async for text in self])

    @property
    def outcome(self) -> Outcome:
        """Tokens, where they came from, the time to the first; complete at the end of the text."""
        return self._stream.outcome

    async def close(self) -> None:
        await self._stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
