"""Generated from async_client.py by ../generate_sync.py: change that one, and run this."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Unpack

import httpx
import msgspec

from baton_client import calls
from baton_client.calls import (
    Call,
    DocumentOptions,
    FileSource,
    Messages,
    OnPrefill,
    Prompt,
    UpdateOptions,
    get,
    path_of,
)
from baton_client.exchange import (
    DEFAULT_TIMEOUT_S,
    DEFAULT_URL,
    JOB_TIMEOUT_S,
    POLL_S,
    Deadline,
    Retry,
    path_and_id,
)
from baton_client.reading import read_answer
from baton_client.sync_connection import (
    Closing,
    Connection,
    Events,
    ItemT,
    Stream,
)
from baton_client.types import (
    Batch,
    ClusterState,
    Completion,
    Deleted,
    Document,
    DocumentEvent,
    File,
    Page,
    RequestTimeline,
)


class Documents:
    """Documents: ingested once, asked often."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, **options: Unpack[DocumentOptions]) -> Document:
        """Have a document ingested. Safe to repeat: it carries an idempotency key, yours or ours.

        Raises:
            BatonAPIError: it is not accepted.
            InvalidCall: not exactly one of text, file, messages, token_ids and file_id.
        """
        return self._connection.call(calls.create_document(options), Document)

    def get(self, document_id: str) -> Document:
        """How a document stands."""
        return self._connection.call(get(path_of("documents", document_id)), Document)

    def list(
        self, *, after: str | None = None, limit: int | None = None, order: str | None = None
    ) -> Page[Document]:
        """A page of the documents, the newest first."""
        call = get("/v1/documents", after=after, limit=limit, order=order)
        return self._connection.call(call, Page[Document])

    def delete(self, document_id: str) -> Deleted:
        """Forget a document, its KV with it."""
        call = Call("DELETE", path_of("documents", document_id))
        return self._connection.call(call, Deleted)

    def update(self, document_id: str, **options: Unpack[UpdateOptions]) -> Document:
        """Pin it otherwise and from now on (``pin="none"`` ends a pin), or change its metadata."""
        return self._connection.call(calls.update_document(document_id, options), Document)

    def cancel(self, document_id: str) -> Document:
        """Stop its making; ``resume`` goes on with it."""
        return self._step(document_id, "cancel")

    def resume(self, document_id: str) -> Document:
        """Go on with one that has failed or was cancelled, where it had got to."""
        return self._step(document_id, "resume")

    def rewarm(self, document_id: str) -> Document:
        """Bring back what has been evicted of it."""
        return self._step(document_id, "rewarm")

    def _step(self, document_id: str, step: str) -> Document:
        call = Call("POST", path_of("documents", document_id, step), body={})
        return self._connection.call(call, Document)

    def events(
        self, document_id: str, *, starting_after: int = 0, timeout_s: float = JOB_TIMEOUT_S
    ) -> Iterator[DocumentEvent]:
        """Every event after a number, each once; ends when the server does no more for it.

        Lost connections and a server that restarts are bridged.

        Raises:
            WaitTimeout: it went on for longer.
        """
        deadline = Deadline(timeout_s, f"the events of {document_id}")
        return self._connection.follow(document_id, starting_after, deadline)

    def wait(
        self,
        document_id: str,
        timeout_s: float = JOB_TIMEOUT_S,
        on_progress: Callable[[Document], object] | None = None,
    ) -> Document:
        """The document once it can be asked about.

        Args:
            document_id: which.
            timeout_s: for how long; the document goes on regardless.
            on_progress: called with the document about once a second.

        Raises:
            JobFailed: it never will.
            WaitTimeout: not yet.
        """
        path = path_of("documents", document_id)
        return self._connection.wait(
            lambda wait_s: get(path, wait=wait_s),
            Document,
            on_progress,
            Deadline(timeout_s, document_id),
        )


class Files:
    """Files: what batches read and write."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(
        self, file: FileSource, *, purpose: str = "batch", filename: str | None = None
    ) -> File:
        """Upload one: a path, its contents, or an open file."""
        return self._connection.call(calls.create_file(file, purpose, filename), File)

    def get(self, file_id: str) -> File:
        return self._connection.call(get(path_of("files", file_id)), File)

    def list(self, *, after: str | None = None, limit: int | None = None) -> Page[File]:
        """A page of the files, the newest first."""
        return self._connection.call(get("/v1/files", after=after, limit=limit), Page[File])

    def delete(self, file_id: str) -> Deleted:
        return self._connection.call(Call("DELETE", path_of("files", file_id)), Deleted)

    def content(self, file_id: str) -> bytes:
        """What is in it."""
        response = self._connection.exchange(get(path_of("files", file_id, "content")))
        return response.content


class Batches:
    """Batches: many requests as a file, answered when there is room."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(
        self,
        input_file_id: str,
        endpoint: str = "/v1/chat/completions",
        *,
        metadata: Mapping[str, str] | None = None,
        completion_window: str = "24h",
        idempotency_key: str | None = None,
    ) -> Batch:
        """Begin one."""
        call = calls.create_batch(
            input_file_id, endpoint, metadata, completion_window, idempotency_key
        )
        return self._connection.call(call, Batch)

    def get(self, batch_id: str) -> Batch:
        return self._connection.call(get(path_of("batches", batch_id)), Batch)

    def list(self, *, after: str | None = None, limit: int | None = None) -> Page[Batch]:
        """A page of the batches, the newest first."""
        call = get("/v1/batches", after=after, limit=limit)
        return self._connection.call(call, Page[Batch])

    def cancel(self, batch_id: str) -> Batch:
        """End one; what it has done by then is in its files."""
        call = Call("POST", path_of("batches", batch_id, "cancel"), body={})
        return self._connection.call(call, Batch)

    def retry(self, batch_id: str) -> Batch:
        """Go on with one that was set aside, or with such lines of a running one."""
        call = Call("POST", path_of("batches", batch_id, "retry"), body={})
        return self._connection.call(call, Batch)

    def wait(
        self,
        batch_id: str,
        timeout_s: float = JOB_TIMEOUT_S,
        on_progress: Callable[[Batch], object] | None = None,
    ) -> Batch:
        """The batch once it is completed.

        Raises:
            JobFailed: it has ended otherwise.
            WaitTimeout: not yet.
        """
        call = get(path_of("batches", batch_id))
        deadline = Deadline(timeout_s, batch_id)
        return self._connection.wait(lambda _: call, Batch, on_progress, deadline)


class Client(Closing):
    """A Baton server, seen from a program. A context manager, used on one event loop, or by one
    thread at a time.

    Args:
        url: of the server.
        api_key: the tenant's, if the server asks for one.
        timeout_s: of each call with all of its attempts; waits have their own.
        poll_s: between two looks at a job.
        retry: when a call is tried again.
        transport: httpx's, in place of a plain connection: for proxies and certificates.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        poll_s: float = POLL_S,
        retry: Retry | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._connection = Connection(url, api_key, timeout_s, poll_s, retry or Retry(), transport)
        self.documents = Documents(self._connection)
        self.files = Files(self._connection)
        self.batches = Batches(self._connection)

    def ask(
        self,
        question: str,
        *,
        document_id: str | None = None,
        timeout_s: float | None = None,
        on_prefill: OnPrefill | None = None,
        **parameters: object,
    ) -> Stream[str]:
        """The answer to a question, piece by piece; about a document, if its id is given.

        Args:
            question: the text.
            document_id: of a document that is ready.
            timeout_s: of the whole answer.
            on_prefill: called with prompt tokens (computed, of all) while there is no text yet.
            parameters: of ``chat``.

        Raises:
            BatonAPIError: it is not taken. Not tried again: it would be computed twice.
        """
        call = calls.chat(calls.question(question, document_id), parameters, stream=True)
        return self._stream(call, lambda chunk: chunk.text or None, timeout_s, on_prefill)

    def chat(
        self,
        messages: Messages,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **parameters: object,
    ) -> Completion:
        """A whole answer.

        Args:
            messages: OpenAI's.
            timeout_s: of the whole answer.
            request_id: what the server shall know the request by; else it makes an id.
            parameters: OpenAI's and the server's own; those that are None are left out.
        """
        call = calls.chat(messages, parameters, stream=False, request_id=request_id)
        return self._answer(call, timeout_s)

    def chat_stream(
        self,
        messages: Messages,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        on_prefill: OnPrefill | None = None,
        **parameters: object,
    ) -> Stream[Completion]:
        """The same, chunk by chunk."""
        call = calls.chat(messages, parameters, stream=True, request_id=request_id)
        return self._stream(call, lambda chunk: chunk, timeout_s, on_prefill)

    def complete(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **parameters: object,
    ) -> Completion:
        """What follows a prompt, a text or token ids; else as ``chat``."""
        call = calls.complete(prompt, parameters, stream=False, request_id=request_id)
        return self._answer(call, timeout_s)

    def complete_stream(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        on_prefill: OnPrefill | None = None,
        **parameters: object,
    ) -> Stream[Completion]:
        """The same, chunk by chunk."""
        call = calls.complete(prompt, parameters, stream=True, request_id=request_id)
        return self._stream(call, lambda chunk: chunk, timeout_s, on_prefill)

    def events(
        self, path: str, body: Mapping[str, Any], *, timeout_s: float | None = None
    ) -> Events:
        """What any path streams, unread: each event with the time of its arrival.

        Args:
            path: such as ``/v1/completions``.
            body: sent as it is; should say ``"stream": True``.
            timeout_s: of the whole stream.
        """
        call = Call("POST", path, body=dict(body))
        return self._connection.events(call, self._connection.deadline(call, timeout_s))

    def _answer(self, call: Call, timeout_s: float | None) -> Completion:
        response = self._connection.exchange(call, timeout_s)
        path, request_id = path_and_id(response)
        answer = read_answer(response.content, request_id)
        return msgspec.structs.replace(answer, path=path, request_id=request_id)

    def _stream(
        self,
        call: Call,
        item_of: Callable[[Completion], ItemT | None],
        timeout_s: float | None,
        on_prefill: OnPrefill | None,
    ) -> Stream[ItemT]:
        deadline = self._connection.deadline(call, timeout_s)
        events = self._connection.events(call, deadline)
        return Stream(events, deadline.started, item_of, on_prefill)

    def cluster(self) -> ClusterState:
        """Pools, ranks and what they hold."""
        return self._connection.call(get("/v1/cluster"), ClusterState)

    def timeline(self, request_id: str) -> RequestTimeline:
        """Where a request's time went; by the id of its answer, or by its x-request-id."""
        call = get(path_of("requests", request_id, "timeline"))
        return self._connection.call(call, RequestTimeline)

    def close(self) -> None:
        self._connection.close()
