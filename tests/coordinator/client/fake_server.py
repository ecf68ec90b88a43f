"""A Baton server that computes nothing: its paths, its shapes and its errors, over real HTTP.

A token is a word. A document moves on by one step each time that somebody looks at it, and a batch
too, so a test waits for nothing. ``faults`` are what the next requests get instead of an answer.
"""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from email import message_from_bytes
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from coordinator.errors import error_response
from coordinator.http.answers import sse
from protocol.errors import RequestError
from tests.coordinator.client.fake_state import (
    BATCH_STEPS,
    MODEL,
    PATH,
    PENDING,
    Seen,
    State,
    timeline,
)


class _Later(RequestError):
    """An error with a Retry-After of its own."""

    retry_after: str | None = None


class _Lost(Exception):
    """The connection closes before the answer is whole."""


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.has_started = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.has_started.set()


def _failed(message: str, code: str, status: int, param: str | None = None) -> RequestError:
    return RequestError(message, code=code, status=status, param=param)


class FakeServer:
    """Serves ``state`` at ``url`` from a thread of its own."""

    def __init__(self) -> None:
        self.state = State()
        routes = [
            Route("/v1/documents", self._documents, methods=["GET", "POST"]),
            Route("/v1/documents/{id}", self._document, methods=["GET", "PATCH", "DELETE"]),
            Route("/v1/documents/{id}/events", self._events, methods=["GET"]),
            Route("/v1/documents/{id}/{step}", self._step, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/files", self._files, methods=["GET", "POST"]),
            Route("/v1/files/{id}", self._file, methods=["GET", "DELETE"]),
            Route("/v1/files/{id}/content", self._content, methods=["GET"]),
            Route("/v1/batches", self._batches, methods=["GET", "POST"]),
            Route("/v1/batches/{id}", self._batch, methods=["GET"]),
            Route("/v1/batches/{id}/cancel", self._cancel_batch, methods=["POST"]),
            Route("/v1/batches/{id}/retry", self._retry_batch, methods=["POST"]),
            Route("/v1/cluster", self._cluster, methods=["GET"]),
            Route("/v1/requests/{id}/timeline", self._timeline, methods=["GET"]),
        ]
        app = Starlette(
            routes=routes, exception_handlers={RequestError: _on_error, _Lost: _on_lost}
        )
        config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off")
        self._server = _Server(config)
        self._thread = threading.Thread(target=self._run)
        self.url = ""

    def start(self) -> None:
        self._thread.start()
        assert self._server.has_started.wait(10)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.run(self._server.serve())

    async def _arrive(self, request: Request) -> Seen:
        """Look at a request as the real server's middleware does, and meet its fault."""
        state, headers = self.state, dict(request.headers)
        body, file = _read(headers.get("content-type", ""), await request.body())
        path = request.url.path
        seen = Seen(request.method, path, dict(request.query_params), headers, body, file)
        state.seen.append(seen)
        if state.faults:
            fault = state.faults.popleft()
            if not fault.status:
                raise _Lost
            error = _Later("not now", code=fault.code, status=fault.status)
            error.retry_after = fault.retry_after
            raise error
        if state.api_key and headers.get("authorization") != f"Bearer {state.api_key}":
            raise _failed("no such API key", "invalid_api_key", 401)
        return seen

    # -- documents ---------------------------------------------------------------------------------

    async def _documents(self, request: Request) -> Response:
        seen = await self._arrive(request)
        if seen.method == "GET":
            return _page(list(self.state.documents.values()))
        key = seen.headers.get("idempotency-key", "")
        if key in self.state.keys:
            return JSONResponse(self.state.documents[self.state.keys[key]])
        if seen.file is not None:
            text = seen.file[1].decode()
        else:
            source = seen.body["source"]
            text = source.get("text") or "of something else"
        pin = json.loads(seen.body["pin"]) if isinstance(seen.body.get("pin"), str) else None
        name = seen.body.get("display_name") or (seen.file and seen.file[0])
        pin = dict(pin or seen.body.get("pin") or {})
        pin.pop("ttl", None)
        document_id = self.state.make_document(name, len(text.split()), pin)
        self.state.keys[key] = document_id
        return JSONResponse(self.state.documents[document_id], status_code=202)

    def _find(self, request: Request) -> dict[str, Any]:
        document = self.state.documents.get(request.path_params["id"])
        if document is None:
            raise _failed("no such document", "document_not_found", 404)
        return document

    async def _document(self, request: Request) -> Response:
        seen, document = await self._arrive(request), self._find(request)
        if seen.method == "DELETE":
            del self.state.documents[document["id"]]
            return JSONResponse({"id": document["id"], "object": "document", "deleted": True})
        if seen.method == "PATCH":
            document["pin"].update(seen.body.get("pin", {}))
            document["metadata"] = seen.body.get("metadata", document["metadata"])
        elif "wait" in seen.query:
            self.state.move_on(document["id"])
        return JSONResponse(document)

    async def _step(self, request: Request) -> Response:
        await self._arrive(request)
        document = self._find(request)
        if request.path_params["step"] == "cancel":
            if document["status"] == "ready":
                raise _failed("the document is ready", "not_cancellable", 409)
            document["status"] = "cancelled"
        else:
            document.update(status="queued", step=0)
        return JSONResponse(document, status_code=202)

    async def _events(self, request: Request) -> Response:
        seen, document = await self._arrive(request), self._find(request)
        after = int(seen.query.get("starting_after", 0))
        limit = self.state.cuts.popleft() if self.state.cuts else None
        return StreamingResponse(self._tell(document["id"], after, limit), headers=_SSE)

    async def _tell(self, document_id: str, after: int, limit: int | None) -> AsyncIterator[bytes]:
        """From one before, as a server may that was not sure of what had arrived."""
        number = max(after - 1, 0)
        while True:
            events = self.state.events[document_id]
            if number == len(events):
                if self.state.documents[document_id]["status"] not in PENDING:
                    yield sse.DONE
                    return
                self.state.move_on(document_id)
                yield sse.keep_alive(None)
                continue
            if limit is not None and number >= after + limit:
                raise _Lost
            event = events[number]
            yield f"id: {number + 1}\nevent: {event['type']}\n".encode() + sse.event(event)
            number += 1

    # -- answers -----------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        seen = await self._arrive(request)
        content = seen.body["messages"][-1]["content"]
        document_id = None
        if isinstance(content, list):
            document_id, content = content[0]["document_id"], content[1]["text"]
            if document_id not in self.state.documents:
                raise _failed("no such document", "document_not_found", 404, "messages")
        words = [f"{word} " for word in (document_id or "you", "asked:", content)]
        if not seen.body["stream"]:
            message = {"role": "assistant", "content": "".join(words), "refusal": None}
            answer = _answer("chat.completion", {"message": message, "finish_reason": "stop"})
            return JSONResponse({**answer, "usage": _USAGE}, headers=_HEADERS)
        headers = {**_SSE, **_HEADERS}
        return StreamingResponse(_stream("chat.completion.chunk", words, content), headers=headers)

    async def _complete(self, request: Request) -> Response:
        seen = await self._arrive(request)
        words, headers = [f"{seen.body['prompt']} ", "and ", "so ", "on"], {**_SSE, **_HEADERS}
        if not seen.body["stream"]:
            choice = {"text": "".join(words), "finish_reason": "length"}
            answer = _answer("text_completion", choice)
            return JSONResponse({**answer, "usage": _USAGE}, headers=_HEADERS)
        return StreamingResponse(_stream("text_completion", words, ""), headers=headers)

    # -- files and batches -------------------------------------------------------------------------

    def _keep_file(self, name: str, content: bytes, purpose: str) -> dict[str, Any]:
        file_id = f"file-{len(self.state.files)}"
        shown = {"id": file_id, "object": "file", "bytes": len(content), "filename": name,
                 "created_at": 1_800_000_000, "purpose": purpose, "status": "processed",
                 "expires_at": None}  # fmt: skip
        self.state.files[file_id] = shown, content
        return shown

    async def _files(self, request: Request) -> Response:
        seen = await self._arrive(request)
        if seen.method == "GET":
            return _page([shown for shown, _ in self.state.files.values()])
        assert seen.file is not None
        return JSONResponse(self._keep_file(*seen.file, seen.body["purpose"]))

    async def _file(self, request: Request) -> Response:
        seen = await self._arrive(request)
        found = self.state.files.get(request.path_params["id"])
        if found is None:
            raise _failed("no such file", "file_not_found", 404)
        if seen.method == "DELETE":
            del self.state.files[found[0]["id"]]
            return JSONResponse({"id": found[0]["id"], "object": "file", "deleted": True})
        return JSONResponse(found[0])

    async def _content(self, request: Request) -> Response:
        await self._arrive(request)
        return Response(self.state.files[request.path_params["id"]][1])

    async def _batches(self, request: Request) -> Response:
        seen = await self._arrive(request)
        if not self.state.offers_batches:
            raise _failed("no such path", "not_found", 404)
        if seen.method == "GET":
            return _page(list(self.state.batches.values()))
        batch_id = f"batch_{len(self.state.batches)}"
        lines = self.state.files[seen.body["input_file_id"]][1].splitlines()
        self.state.batches[batch_id] = {
            "id": batch_id, "object": "batch", "status": "validating", "errors": None,
            **seen.body, "output_file_id": None, "error_file_id": None,
            "created_at": 1_800_000_000, "step": 0,
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
        }  # fmt: skip
        return JSONResponse(self.state.batches[batch_id])

    async def _batch(self, request: Request) -> Response:
        await self._arrive(request)
        batch = self.state.batches.get(request.path_params["id"])
        if batch is None:
            raise _failed("no such batch", "batch_not_found", 404)
        if batch["step"] < len(BATCH_STEPS) and batch["status"] != "cancelled":
            batch["status"] = BATCH_STEPS[batch["step"]]
            batch["step"] += 1
        if batch["status"] == "completed" and batch["output_file_id"] is None:
            content = self.state.files[batch["input_file_id"]][1]
            batch["output_file_id"] = self._keep_file("output", content, "batch_output")["id"]
            batch["request_counts"]["completed"] = batch["request_counts"]["total"]
        return JSONResponse(batch)

    async def _retry_batch(self, request: Request) -> Response:
        await self._arrive(request)
        batch = self.state.batches[request.path_params["id"]]
        batch["status"] = "validating"
        return JSONResponse(batch, status_code=202)

    async def _cancel_batch(self, request: Request) -> Response:
        await self._arrive(request)
        batch = self.state.batches[request.path_params["id"]]
        batch["status"] = "cancelled"
        return JSONResponse(batch)

    # -- state -------------------------------------------------------------------------------------

    async def _cluster(self, request: Request) -> Response:
        await self._arrive(request)
        return JSONResponse(self.state.cluster)

    async def _timeline(self, request: Request) -> Response:
        await self._arrive(request)
        request_id = request.path_params["id"]
        if request_id == "unknown":
            raise _failed("no such request", "request_not_found", 404)
        return JSONResponse(timeline(request_id))


_SSE = {name.decode(): value.decode() for name, value in sse.HEADERS}
_HEADERS = {"x-baton-path": PATH, "x-request-id": "r1"}
_USAGE = {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11,
          "prompt_tokens_details": {"cached_tokens": 3}}  # fmt: skip


def _answer(kind: str, *choices: dict[str, Any]) -> dict[str, Any]:
    shown = [{"index": 0, "logprobs": None, **choice} for choice in choices]
    return {"id": "answer-1", "object": kind, "created": 1, "model": MODEL, "choices": shown}


async def _stream(kind: str, words: list[str], question: str) -> AsyncIterator[bytes]:
    yield sse.keep_alive((3, 7))
    for word in words:
        piece = {"delta": {"content": word}} if kind.startswith("chat") else {"text": word}
        yield sse.event(_answer(kind, {**piece, "finish_reason": None}))
        if question == "fail":
            yield sse.error_event(_failed("the pool is gone", "worker_lost", 503))
            return
        if question == "break":
            return
    end: dict[str, Any] = {"delta": {}} if kind.startswith("chat") else {"text": ""}
    yield sse.event(_answer(kind, {**end, "finish_reason": "stop"}))
    miss = {"reason": "evicted", "missed_tokens": 2} if question == "evicted" else None
    last = {**_answer(kind), "usage": _USAGE}
    yield sse.event({**last, "cache_miss": miss} if miss else last)
    yield sse.DONE


def _page(data: list[dict[str, Any]]) -> Response:
    return JSONResponse({"object": "list", "data": data[::-1], "has_more": False})


def _read(content_type: str, body: bytes) -> tuple[Any, tuple[str, bytes] | None]:
    """A body's fields and file."""
    if not content_type.startswith("multipart/form-data"):
        return json.loads(body) if body else None, None
    fields: dict[str, str] = {}
    file = None
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    for part in message_from_bytes(head + body).get_payload():
        assert not isinstance(part, str)
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        assert isinstance(name, str)
        if part.get_filename() is None:
            fields[name] = content.decode()
        else:
            file = (part.get_filename() or "", content)
    return fields, file


async def _on_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    status, headers, body = error_response(error)
    shown = {name.decode(): value.decode() for name, value in headers}
    if isinstance(error, _Later) and error.retry_after is not None:
        shown["retry-after"] = error.retry_after
    return Response(body, status, {**shown, "x-request-id": "r1"})


async def _on_lost(_request: Request, _error: Exception) -> Response:
    return StreamingResponse(_nothing())


async def _nothing() -> AsyncIterator[bytes]:
    yield b""
    raise _Lost


@contextlib.contextmanager
def running() -> Iterator[FakeServer]:
    """A server for as long as the block lasts."""
    server = FakeServer()
    server.start()
    try:
        yield server
    finally:
        server.stop()
