"""Generated from async_connection.py by ../generate_sync.py: change that one, and run this."""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

import httpx

from baton_client.calls import Call, OnPrefill, get, path_of
from baton_client.errors import BatonConnectionError, ClientError, JobFailed
from baton_client.exchange import (
    Attempts,
    Deadline,
    Retry,
    T,
    check_settings,
    decode,
    path_and_id,
    raise_for_status,
    request_fields,
    translated,
)
from baton_client.reading import Outcome, read_answer, read_document_event, read_progress
from baton_client.sse import DONE, Comment, EventParser, ServerEvent
from baton_client.types import Batch, Completion, Document, DocumentEvent

JobT = TypeVar("JobT", Document, Batch)
ItemT = TypeVar("ItemT", str, Completion)


class Closing(ABC):
    """What is closed when its block ends."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Events(Closing):
    """The events of a response as they arrive, each with its time on the monotonic clock.

    Iterate over it once; leaving it ends the request on the server too. It is over with the event
    ``DONE``, which is not given.

    Raises:
        BatonConnectionError: while iterating: the response has ended without that event.
    """

    def __init__(self, response: httpx.Response, url: str, deadline: Deadline) -> None:
        self.path, self.request_id = path_and_id(response)
        self._response = response
        self._url = url
        self._deadline = deadline
        self._items = self._read()

    def _read(self) -> Iterator[tuple[float, ServerEvent | Comment]]:
        parser = EventParser()
        with self:
            with translated(self._url, self._deadline):
                for data in self._response.iter_bytes():
                    at = time.monotonic()
                    self._deadline.check()
                    for event in parser.feed(data):
                        if isinstance(event, ServerEvent) and event.data == DONE:
                            return
                        yield at, event
        raise BatonConnectionError("the stream broke off before its end")

    def __iter__(self) -> Iterator[tuple[float, ServerEvent | Comment]]:
        return self._items

    def close(self) -> None:
        self._response.close()


class Stream(Closing, Generic[ItemT]):
    """A streamed answer: its chunks, or its text piece by piece.

    Iterate over it once; leaving it ends the answer on the server too. ``outcome`` tells of tokens,
    where they came from, and the time to the first; it is complete at the end.

    Raises:
        BatonAPIError: while iterating: the answer has failed on its way.
        BatonConnectionError: while iterating: it has broken off.
    """

    def __init__(
        self,
        events: Events,
        started: float,
        item_of: Callable[[Completion], ItemT | None],
        on_prefill: OnPrefill | None,
    ) -> None:
        self.outcome = Outcome(started, events.request_id, events.path)
        self._events = events
        self._item_of: Callable[[Completion], ItemT | None] = item_of
        self._on_prefill = on_prefill
        self._items: Iterator[ItemT] = self._read()

    def _read(self) -> Iterator[ItemT]:
        with self._events:
            for at, event in self._events:
                if isinstance(event, Comment):
                    progress = read_progress(event)
                    if self._on_prefill is not None and progress is not None:
                        self._on_prefill(*progress)
                    continue
                chunk = read_answer(event.data, self.outcome.request_id)
                self.outcome.take(chunk, at)
                item = self._item_of(chunk)
                if item is not None:
                    yield item

    def __iter__(self) -> Iterator[ItemT]:
        return self._items

    def read(self) -> str:
        """What is left of the text, all of it if nothing has been read."""
        pieces = [item for item in self]
        return "".join(piece if isinstance(piece, str) else piece.text for piece in pieces)

    def close(self) -> None:
        self._events.close()


class Connection(Closing):
    """Sends calls; the client has the arguments."""

    def __init__(
        self,
        url: str,
        api_key: str | None,
        timeout_s: float,
        poll_s: float,
        retry: Retry,
        transport: httpx.BaseTransport | None,
    ) -> None:
        is_secure = check_settings(url, api_key)
        self._url = url
        self._timeout_s = timeout_s
        self._poll_s = poll_s
        self._retry = retry
        self._http = httpx.Client(
            base_url=url.rstrip("/"),
            headers={} if api_key is None else {"authorization": f"Bearer {api_key}"},
            transport=transport,
            trust_env=False,
            verify=is_secure,  # else the system's certificates need not be loaded: that is slow
        )

    def close(self) -> None:
        self._http.close()

    def deadline(self, call: Call, timeout_s: float | None = None) -> Deadline:
        seconds = self._timeout_s if timeout_s is None else timeout_s
        return Deadline(seconds, f"{call.method} {call.path}")

    def call(self, call: Call, kind: type[T]) -> T:
        """The object that a call answers with.

        Raises:
            ClientError: there is none.
        """
        return decode(self.exchange(call), kind)

    def exchange(self, call: Call, timeout_s: float | None = None) -> httpx.Response:
        """A whole response; a call that may be repeated is, if that can help."""
        deadline = self.deadline(call, timeout_s)
        attempts = Attempts(self._retry, deadline, is_repeatable=call.is_repeatable)
        while True:
            try:
                return self._once(call, deadline)
            except ClientError as error:
                time.sleep(attempts.pause_s(error))

    def events(self, call: Call, deadline: Deadline) -> Events:
        """The events that a call answers with, once the headers are there."""
        response = self._send(call, deadline, stream=True)
        if not response.is_success:
            with contextlib.closing(response):
                with translated(self._url, deadline):
                    response.read()
            raise_for_status(response)
        return Events(response, self._url, deadline)

    def _once(self, call: Call, deadline: Deadline) -> httpx.Response:
        response = self._send(call, deadline, stream=False)
        raise_for_status(response)
        return response

    def _send(self, call: Call, deadline: Deadline, *, stream: bool) -> httpx.Response:
        opened = contextlib.nullcontext() if call.upload is None else call.upload.open()
        with opened as file, translated(self._url, deadline):
            fields = request_fields(call, file, deadline, stream=stream)
            request = self._http.build_request(**fields)
            try:
                with contextlib.nullcontext(deadline.left_s):
                    return self._http.send(request, stream=stream)
            except TimeoutError as error:
                raise deadline.timeout() from error

    def wait(
        self,
        call_of: Callable[[float], Call],
        kind: type[JobT],
        on_progress: Callable[[JobT], object] | None,
        deadline: Deadline,
    ) -> JobT:
        """A job that has ended well; looked at again and again.

        Args:
            call_of: the look, given how long the server may wait for a change.
            kind: of the job.
            on_progress: called with what each look has found.
            deadline: of the wait.

        Raises:
            JobFailed: it has ended otherwise.
            WaitTimeout: it has not ended in time, and goes on.
            ClientError: it cannot be looked at.
        """
        attempts = Attempts(self._retry, deadline)
        while True:
            deadline.check()
            looked, wait_s = time.monotonic(), min(self._poll_s, deadline.left_s)
            try:
                job = decode(self._once(call_of(max(0.0, wait_s)), deadline), kind)
            except ClientError as error:
                time.sleep(attempts.pause_s(error))
                continue
            attempts.succeeded()
            if on_progress is not None:
                on_progress(job)
            if not job.is_pending:
                break
            pause_s = self._poll_s - (time.monotonic() - looked)
            time.sleep(max(0.0, min(pause_s, deadline.left_s)))
        if not job.is_usable:
            problem = f": {job.problem}" if job.problem else ""
            raise JobFailed(f"{job.id} is {job.status}{problem}", job)
        return job

    def follow(self, document_id: str, last: int, deadline: Deadline) -> Iterator[DocumentEvent]:
        """The events of a document after number ``last``, over as many connections as it takes."""
        attempts = Attempts(self._retry, deadline)
        while True:
            call = get(path_of("documents", document_id, "events"), starting_after=last)
            try:
                with self.events(call, deadline) as events:
                    attempts.answered()
                    for _, item in events:
                        if isinstance(item, Comment):
                            continue
                        event = read_document_event(item)
                        if event.sequence_number > last:
                            last = event.sequence_number
                            attempts.succeeded()
                            yield event
                return
            except ClientError as error:
                time.sleep(attempts.pause_s(error))
