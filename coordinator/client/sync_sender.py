"""Calls and streams over a blocking connection."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
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

Get = Callable[[Budget], T]


class Sender:
    """Sends calls.

    Args:
        settings: the server, the key, the budgets.
        transport: in place of the network.
    """

    def __init__(self, settings: Settings, transport: httpx.BaseTransport | None) -> None:
        self.settings = settings
        self._http = httpx.Client(
            base_url=settings.base_url,
            headers=settings.headers,
            transport=transport,
            trust_env=False,
            verify=settings.is_secure,
        )

    def close(self) -> None:
        self._http.close()

    def call(self, call: Call, kind: type[T], timeout_s: float | None = None) -> T:
        """The object that a call answers with.

        Raises:
            ClientError: there is none.
        """
        return decode(self.exchange(call, timeout_s), kind)

    def exchange(self, call: Call, timeout_s: float | None = None) -> httpx.Response:
        """A whole response; a call that may be repeated is, if that can help."""
        budget, retry = self.settings.budget(call, timeout_s), self.settings.retry
        number = 0
        while True:
            number += 1
            try:
                return self.once(call, budget)
            except (BatonAPIError, BatonConnectionError) as error:
                delay = retry.delay_s(number, error, self.settings.random)
                if not call.is_repeatable or delay is None or delay >= budget.left_s:
                    raise
                time.sleep(delay)

    def once(self, call: Call, budget: Budget) -> httpx.Response:
        """A whole response, of one attempt."""
        response = self._send(call, budget, stream=False)
        raise_for_status(response)
        return response

    def open(self, call: Call, budget: Budget) -> httpx.Response:
        """A response whose body is still to come; whoever called closes it."""
        response = self._send(call, budget, stream=True)
        if not response.is_success:
            with closing(response), translated(self.settings.url, budget):
                response.read()
            raise_for_status(response)
        return response

    def _send(self, call: Call, budget: Budget, *, stream: bool) -> httpx.Response:
        with ExitStack() as stack:
            file = stack.enter_context(call.upload.open()) if call.upload is not None else None
            request = self._http.build_request(**request_fields(call, file, budget))
            if stream:
                timeouts = request.extensions["timeout"]
                timeouts["read"] = min(SILENCE_S, timeouts["read"])
            stack.enter_context(translated(self.settings.url, budget))
            return self._http.send(request, stream=stream)

    def stream(self, call: Call, reading: Reading[ChunkT], budget: Budget) -> "Stream[ChunkT]":
        """A streamed answer, once its headers are there."""
        response = self.open(call, budget)
        path, request_id = path_and_id(response)
        reading.begin(request_id, path)
        return Stream(response, reading, self.settings.url, budget)

    def follow(self, following: Following, patience: Patience) -> Iterator[DocumentEvent]:
        """Events, over as many connections as it takes."""
        while not following.is_over:
            try:
                yield from self._follow_once(following, patience)
            except (BatonAPIError, BatonConnectionError) as error:
                time.sleep(patience.delay_s(error))

    def _follow_once(self, following: Following, patience: Patience) -> Iterator[DocumentEvent]:
        budget = patience.budget
        response = self.open(following.call(), budget)
        patience.answered()
        with closing(response), translated(self.settings.url, budget):
            for data in response.iter_bytes():
                budget.check()
                for event in following.feed(data):
                    patience.got_on()
                    yield event
                if following.is_over:
                    return
        raise BatonConnectionError("the events broke off")

    def wait(
        self,
        get: Get[T],
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
                job = get(budget)
            except (BatonAPIError, BatonConnectionError) as error:
                time.sleep(patience.delay_s(error))
                continue
            patience.got_on()
            if on_progress is not None:
                on_progress(job)
            if not is_pending(job):
                return job
            pause = self.settings.poll_s - (budget.clock() - looked)
            time.sleep(max(0.0, min(pause, budget.left_s)))


class Stream(Generic[ChunkT]):
    """An answer that is coming in. Iterate over it once; leaving it ends it on the server too."""

    def __init__(
        self, response: httpx.Response, reading: Reading[ChunkT], url: str, budget: Budget
    ) -> None:
        self._response = response
        self._reading: Reading[ChunkT] = reading
        self._url = url
        self._budget = budget
        self._chunks: Iterator[ChunkT] = self._read()

    def _read(self) -> Iterator[ChunkT]:
        with closing(self._response), translated(self._url, self._budget):
            for data in self._response.iter_bytes():
                self._budget.check()
                yield from self._reading.feed(data)
                if self._reading.is_done:
                    return
            self._reading.end()

    def __iter__(self) -> Iterator[ChunkT]:
        return self._chunks

    @property
    def outcome(self) -> Outcome:
        """What came with the text; complete when the iteration is over."""
        return self._reading.outcome

    def close(self) -> None:
        self._response.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Answer:
    """A streamed answer to a question, as text."""

    def __init__(self, stream: Stream[ChatChunk]) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[str]:
        return (chunk.text for chunk in self._stream if chunk.text)

    def read(self) -> str:
        """What is left of the text, all of it if nothing has been read."""
        return "".join(self)

    @property
    def outcome(self) -> Outcome:
        """Tokens, where they came from, the time to the first; complete at the end of the text."""
        return self._stream.outcome

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
