"""The blocking client."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self, Unpack

import httpx

from coordinator.client import requests
from coordinator.client.budget import Budget, Patience, Retry
from coordinator.client.exchange import (
    DEFAULT_TIMEOUT_S,
    DEFAULT_URL,
    JOB_TIMEOUT_S,
    POLL_S,
    Settings,
    check_batch,
    check_document,
    decode,
    decode_answer,
)
from coordinator.client.following import Following
from coordinator.client.reading import ChunkT, Reading
from coordinator.client.requests import (
    AskOptions,
    Call,
    DocumentOptions,
    FileSource,
    Messages,
    OnPrefill,
    UpdateOptions,
    get,
    path_of,
)
from coordinator.client.state import ClusterState, RequestTimeline
from coordinator.client.sync_sender import Answer, Sender, Stream
from coordinator.client.types import (
    Batch,
    ChatChunk,
    ChatCompletion,
    Completion,
    Deleted,
    Document,
    DocumentEvent,
    File,
    Page,
)


class Documents:
    """Documents: ingested once, asked often."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    def create(self, **options: Unpack[DocumentOptions]) -> Document:
        """Have a document ingested. Safe to repeat: it carries an idempotency key, yours or ours.

        Raises:
            BatonAPIError: it is not accepted.
            ConfigError: not exactly one of text, file, messages, token_ids and file_id.
        """
        return self._sender.call(requests.create_document(options), Document)

    def get(self, document_id: str) -> Document:
        """How a document stands."""
        return self._sender.call(get(path_of("documents", document_id)), Document)

    def list(
        self, *, after: str | None = None, limit: int | None = None, order: str | None = None
    ) -> Page[Document]:
        """A page of the documents, the newest first."""
        call = get("/v1/documents", after=after, limit=limit, order=order)
        return self._sender.call(call, Page[Document])

    def delete(self, document_id: str) -> Deleted:
        """Forget a document, its KV with it."""
        return self._sender.call(Call("DELETE", path_of("documents", document_id)), Deleted)

    def update(self, document_id: str, **options: Unpack[UpdateOptions]) -> Document:
        """Pin it otherwise and from now on (``pin="none"`` ends a pin), or change its metadata."""
        return self._sender.call(requests.update_document(document_id, options), Document)

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
        return self._sender.call(
            Call("POST", path_of("documents", document_id, step), body={}), Document
        )

    def events(
        self, document_id: str, *, starting_after: int = 0, timeout_s: float = JOB_TIMEOUT_S
    ) -> Iterator[DocumentEvent]:
        """Every event after a number, each once; ends when the server does no more for it.

        Lost connections and a server that restarts are bridged.

        Raises:
            WaitTimeout: it went on for longer.
        """
        settings = self._sender.settings
        budget = Budget(timeout_s, f"the events of {document_id}")
        patience = Patience(settings.retry, budget, settings.random)
        return self._sender.follow(Following(document_id, starting_after), patience)

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

        def look(budget: Budget) -> Document:
            wait_s = max(0.0, min(self._sender.settings.poll_s, budget.left_s))
            call = get(path_of("documents", document_id), wait=wait_s)
            return decode(self._sender.once(call, budget), Document)

        budget = Budget(timeout_s, document_id)
        return check_document(
            self._sender.wait(look, lambda found: found.is_pending, on_progress, budget)
        )


class Files:
    """Files: what batches read and write."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    def create(
        self, file: FileSource, *, purpose: str = "batch", filename: str | None = None
    ) -> File:
        """Upload one: a path, its contents, or an open file."""
        return self._sender.call(requests.create_file(file, purpose, filename), File)

    def get(self, file_id: str) -> File:
        return self._sender.call(get(path_of("files", file_id)), File)

    def list(self, *, after: str | None = None, limit: int | None = None) -> Page[File]:
        """A page of the files, the newest first."""
        return self._sender.call(get("/v1/files", after=after, limit=limit), Page[File])

    def delete(self, file_id: str) -> Deleted:
        return self._sender.call(Call("DELETE", path_of("files", file_id)), Deleted)

    def content(self, file_id: str) -> bytes:
        """What is in it."""
        return self._sender.exchange(get(path_of("files", file_id, "content"))).content


class Batches:
    """Batches: many requests as a file, answered when there is room."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

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
        call = requests.create_batch(
            input_file_id, endpoint, metadata, completion_window, idempotency_key
        )
        return self._sender.call(call, Batch)

    def get(self, batch_id: str) -> Batch:
        return self._sender.call(get(path_of("batches", batch_id)), Batch)

    def list(self, *, after: str | None = None, limit: int | None = None) -> Page[Batch]:
        """A page of the batches, the newest first."""
        return self._sender.call(get("/v1/batches", after=after, limit=limit), Page[Batch])

    def cancel(self, batch_id: str) -> Batch:
        """End one; what it has done by then is in its files."""
        return self._sender.call(
            Call("POST", path_of("batches", batch_id, "cancel"), body={}), Batch
        )

    def retry(self, batch_id: str) -> Batch:
        """Go on with one that was set aside, or with such lines of a running one."""
        return self._sender.call(
            Call("POST", path_of("batches", batch_id, "retry"), body={}), Batch
        )

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

        def look(budget: Budget) -> Batch:
            return decode(self._sender.once(get(path_of("batches", batch_id)), budget), Batch)

        budget = Budget(timeout_s, batch_id)
        return check_batch(
            self._sender.wait(look, lambda found: found.is_pending, on_progress, budget)
        )


class Client:
    """A Baton server, seen from a program. A context manager; used by one thread at a time.

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
        settings = Settings(url, api_key, timeout_s, poll_s, retry or Retry())
        self._sender = Sender(settings, transport)
        self.documents = Documents(self._sender)
        self.files = Files(self._sender)
        self.batches = Batches(self._sender)

    def ask(self, question: str, **options: Unpack[AskOptions]) -> Answer:
        """The answer to a question, piece by piece; about a document, if its id is given.

        Raises:
            BatonAPIError: it is not taken. Not tried again: it would be computed twice.
        """
        call = requests.ask(question, options)
        timeout_s, on_prefill = options.get("timeout_s"), options.get("on_prefill")
        return Answer(self._stream(call, ChatChunk, timeout_s, on_prefill))

    def chat(self, messages: Messages, **parameters: object) -> ChatCompletion:
        """A whole answer; ``parameters`` are OpenAI's."""
        call = requests.chat(messages, parameters, stream=False)
        return decode_answer(self._sender.exchange(call), ChatCompletion)

    def chat_stream(self, messages: Messages, **parameters: object) -> Stream[ChatChunk]:
        """The same, chunk by chunk."""
        return self._stream(requests.chat(messages, parameters, stream=True), ChatChunk)

    def complete(self, prompt: str | Sequence[int], **parameters: object) -> Completion:
        """What follows a prompt; ``parameters`` are OpenAI's."""
        call = requests.complete(prompt, parameters, stream=False)
        return decode_answer(self._sender.exchange(call), Completion)

    def complete_stream(
        self, prompt: str | Sequence[int], **parameters: object
    ) -> Stream[Completion]:
        """The same, chunk by chunk."""
        return self._stream(requests.complete(prompt, parameters, stream=True), Completion)

    def _stream(
        self,
        call: Call,
        kind: type[ChunkT],
        timeout_s: float | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> Stream[ChunkT]:
        budget = self._sender.settings.budget(call, timeout_s)
        reading = Reading(kind, budget.started, budget.clock, on_prefill)
        return self._sender.stream(call, reading, budget)

    def cluster(self) -> ClusterState:
        """Pools, ranks and what they hold."""
        return self._sender.call(get("/v1/cluster"), ClusterState)

    def timeline(self, request_id: str) -> RequestTimeline:
        """Where a request's time went; by the id of its answer, or by its x-request-id."""
        return self._sender.call(get(path_of("requests", request_id, "timeline")), RequestTimeline)

    def close(self) -> None:
        self._sender.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
