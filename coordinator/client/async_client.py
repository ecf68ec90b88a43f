"""The client for an event loop: sync_client.py with ``await``."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Self, Unpack

import httpx

from coordinator.client import requests
from coordinator.client.async_sender import AsyncAnswer, AsyncSender, AsyncStream
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


class AsyncDocuments:
    """Documents: ingested once, asked often."""

    def __init__(self, sender: AsyncSender) -> None:
        self._sender = sender

    async def create(self, **options: Unpack[DocumentOptions]) -> Document:
        """Have a document ingested. Safe to repeat: it carries an idempotency key, yours or ours.

        Raises:
            BatonAPIError: it is not accepted.
            ConfigError: not exactly one of text, file, messages, token_ids and file_id.
        """
        return await self._sender.call(requests.create_document(options), Document)

    async def get(self, document_id: str) -> Document:
        """How a document stands."""
        return await self._sender.call(get(path_of("documents", document_id)), Document)

    async def list(
        self, *, after: str | None = None, limit: int | None = None, order: str | None = None
    ) -> Page[Document]:
        """A page of the documents, the newest first."""
        call = get("/v1/documents", after=after, limit=limit, order=order)
        return await self._sender.call(call, Page[Document])

    async def delete(self, document_id: str) -> Deleted:
        """Forget a document, its KV with it."""
        return await self._sender.call(Call("DELETE", path_of("documents", document_id)), Deleted)

    async def update(self, document_id: str, **options: Unpack[UpdateOptions]) -> Document:
        """Pin it otherwise and from now on (``pin="none"`` ends a pin), or change its metadata."""
        return await self._sender.call(requests.update_document(document_id, options), Document)

    async def cancel(self, document_id: str) -> Document:
        """Stop its making; ``resume`` goes on with it."""
        return await self._step(document_id, "cancel")

    async def resume(self, document_id: str) -> Document:
        """Go on with one that has failed or was cancelled, where it had got to."""
        return await self._step(document_id, "resume")

    async def rewarm(self, document_id: str) -> Document:
        """Bring back what has been evicted of it."""
        return await self._step(document_id, "rewarm")

    async def _step(self, document_id: str, step: str) -> Document:
        return await self._sender.call(
            Call("POST", path_of("documents", document_id, step), body={}), Document
        )

    def events(
        self, document_id: str, *, starting_after: int = 0, timeout_s: float = JOB_TIMEOUT_S
    ) -> AsyncIterator[DocumentEvent]:
        """Every event after a number, each once; ends when the server does no more for it.

        Lost connections and a server that restarts are bridged.

        Raises:
            WaitTimeout: it went on for longer.
        """
        settings = self._sender.settings
        budget = Budget(timeout_s, f"the events of {document_id}")
        patience = Patience(settings.retry, budget, settings.random)
        return self._sender.follow(Following(document_id, starting_after), patience)

    async def wait(
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

        async def look(budget: Budget) -> Document:
            wait_s = max(0.0, min(self._sender.settings.poll_s, budget.left_s))
            call = get(path_of("documents", document_id), wait=wait_s)
            return decode(await self._sender.once(call, budget), Document)

        budget = Budget(timeout_s, document_id)
        return check_document(
            await self._sender.wait(look, lambda found: found.is_pending, on_progress, budget)
        )


class AsyncFiles:
    """Files: what batches read and write."""

    def __init__(self, sender: AsyncSender) -> None:
        self._sender = sender

    async def create(
        self, file: FileSource, *, purpose: str = "batch", filename: str | None = None
    ) -> File:
        """Upload one: a path, its contents, or an open file."""
        return await self._sender.call(requests.create_file(file, purpose, filename), File)

    async def get(self, file_id: str) -> File:
        return await self._sender.call(get(path_of("files", file_id)), File)

    async def list(self, *, after: str | None = None, limit: int | None = None) -> Page[File]:
        """A page of the files, the newest first."""
        return await self._sender.call(get("/v1/files", after=after, limit=limit), Page[File])

    async def delete(self, file_id: str) -> Deleted:
        return await self._sender.call(Call("DELETE", path_of("files", file_id)), Deleted)

    async def content(self, file_id: str) -> bytes:
        """What is in it."""
        return (await self._sender.exchange(get(path_of("files", file_id, "content")))).content


class AsyncBatches:
    """Batches: many requests as a file, answered when there is room."""

    def __init__(self, sender: AsyncSender) -> None:
        self._sender = sender

    async def create(
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
        return await self._sender.call(call, Batch)

    async def get(self, batch_id: str) -> Batch:
        return await self._sender.call(get(path_of("batches", batch_id)), Batch)

    async def list(self, *, after: str | None = None, limit: int | None = None) -> Page[Batch]:
        """A page of the batches, the newest first."""
        return await self._sender.call(get("/v1/batches", after=after, limit=limit), Page[Batch])

    async def cancel(self, batch_id: str) -> Batch:
        """End one; what it has done by then is in its files."""
        return await self._sender.call(
            Call("POST", path_of("batches", batch_id, "cancel"), body={}), Batch
        )

    async def retry(self, batch_id: str) -> Batch:
        """Go on with one that was set aside, or with such lines of a running one."""
        return await self._sender.call(
            Call("POST", path_of("batches", batch_id, "retry"), body={}), Batch
        )

    async def wait(
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

        async def look(budget: Budget) -> Batch:
            return decode(await self._sender.once(get(path_of("batches", batch_id)), budget), Batch)

        budget = Budget(timeout_s, batch_id)
        return check_batch(
            await self._sender.wait(look, lambda found: found.is_pending, on_progress, budget)
        )


class AsyncClient:
    """A Baton server, seen from a program. A context manager; used on one event loop.

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
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        settings = Settings(url, api_key, timeout_s, poll_s, retry or Retry())
        self._sender = AsyncSender(settings, transport)
        self.documents = AsyncDocuments(self._sender)
        self.files = AsyncFiles(self._sender)
        self.batches = AsyncBatches(self._sender)

    async def ask(self, question: str, **options: Unpack[AskOptions]) -> AsyncAnswer:
        """The answer to a question, piece by piece; about a document, if its id is given.

        Raises:
            BatonAPIError: it is not taken. Not tried again: it would be computed twice.
        """
        call = requests.ask(question, options)
        timeout_s, on_prefill = options.get("timeout_s"), options.get("on_prefill")
        return AsyncAnswer(await self._stream(call, ChatChunk, timeout_s, on_prefill))

    async def chat(self, messages: Messages, **parameters: object) -> ChatCompletion:
        """A whole answer; ``parameters`` are OpenAI's."""
        call = requests.chat(messages, parameters, stream=False)
        return decode_answer(await self._sender.exchange(call), ChatCompletion)

    async def chat_stream(self, messages: Messages, **parameters: object) -> AsyncStream[ChatChunk]:
        """The same, chunk by chunk."""
        return await self._stream(requests.chat(messages, parameters, stream=True), ChatChunk)

    async def complete(self, prompt: str | Sequence[int], **parameters: object) -> Completion:
        """What follows a prompt; ``parameters`` are OpenAI's."""
        call = requests.complete(prompt, parameters, stream=False)
        return decode_answer(await self._sender.exchange(call), Completion)

    async def complete_stream(
        self, prompt: str | Sequence[int], **parameters: object
    ) -> AsyncStream[Completion]:
        """The same, chunk by chunk."""
        return await self._stream(requests.complete(prompt, parameters, stream=True), Completion)

    async def _stream(
        self,
        call: Call,
        kind: type[ChunkT],
        timeout_s: float | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> AsyncStream[ChunkT]:
        budget = self._sender.settings.budget(call, timeout_s)
        reading = Reading(kind, budget.started, budget.clock, on_prefill)
        return await self._sender.stream(call, reading, budget)

    async def cluster(self) -> ClusterState:
        """Pools, ranks and what they hold."""
        return await self._sender.call(get("/v1/cluster"), ClusterState)

    async def timeline(self, request_id: str) -> RequestTimeline:
        """Where a request's time went; by the id of its answer, or by its x-request-id."""
        return await self._sender.call(
            get(path_of("requests", request_id, "timeline")), RequestTimeline
        )

    async def close(self) -> None:
        await self._sender.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
