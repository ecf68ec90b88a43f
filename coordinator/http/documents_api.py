"""``/v1/documents``: paths to functions.

A multipart upload is streamed to the disk by the code that reads files for ``/v1/files``; what
arrives here is a file that is ours to move.
"""

import asyncio
import hashlib
import math
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from coordinator.auth import SCOPE_TENANT, Tenant
from coordinator.http.connections.limits import SCOPE_IS_UPLOAD
from coordinator.http.document_events import EventStream
from coordinator.http.frontend import Frontend, jobs_of
from coordinator.http.uploads import receive_upload
from coordinator.jobs.documents.document import Document
from coordinator.jobs.documents.documents import Documents, Source
from coordinator.jobs.documents.states import FINAL, PENDING
from coordinator.jobs.space import check_space
from coordinator.jobs.suspects import LINE, Work
from coordinator.text.tasks import Asked, NeedsFile, ReadDocument, Uploaded
from coordinator.validation.bodies import Body
from coordinator.validation.document_bodies import (
    UpdateBody,
    as_pin,
    check_metadata,
    fields_of_form,
)
from coordinator.validation.schemas import validate
from protocol.errors import RequestError

MAX_PAGE = 100
DEFAULT_PAGE = 20
MAX_SEQUENCE = 2**53


def add_documents(app: FastAPI, frontend: Frontend) -> None:
    """Add the routes, if this coordinator has jobs."""
    if frontend.jobs is None:
        return
    documents = frontend.jobs.documents
    _add_making(app, frontend, documents)
    _add_looking(app, frontend, documents)
    _add_steps(app, documents)


def _tenant(request: Request) -> str:
    name: str = request.scope[SCOPE_TENANT].name
    return name


def _add_making(app: FastAPI, frontend: Frontend, documents: Documents) -> None:
    @app.post("/v1/documents")
    async def create(request: Request) -> Response:
        if not request.scope.get(SCOPE_IS_UPLOAD):
            async with frontend.body(request) as body:
                return await _create(frontend, request, body, None)
        assert frontend.jobs is not None, "the route exists only with jobs"
        limits, min_free_bytes = frontend.config.limits, frontend.jobs.min_free_bytes
        await asyncio.to_thread(check_space, documents.folder, 0, min_free_bytes=min_free_bytes)
        await documents.maintenance.wait_recovered()
        async with (
            frontend.room_for_upload(request),
            receive_upload(request, documents.folder, limits, min_free_bytes) as upload,
        ):
            uploaded = Uploaded(
                *(str(upload.path), upload.file_name, True, upload.media_type, upload.charset)
            )
            body = Body(msgspec.json.encode(fields_of_form(upload.fields, limits)))
            return await _create(frontend, request, body, uploaded)

    @app.patch("/v1/documents/{document_id}")
    async def update(request: Request, document_id: str) -> Response:
        body = validate(UpdateBody, await frontend.fields(request))
        pin = None
        if body.pin is not None:
            pin = as_pin(body.pin, documents.limits, documents.tiers)
        metadata = body.metadata
        if metadata is not None:
            check_metadata(metadata, frontend.config.limits.max_label_chars)
        document = await documents.update(_tenant(request), document_id, pin, metadata)
        return await _whole(documents, document)

    @app.delete("/v1/documents/{document_id}")
    async def delete(request: Request, document_id: str) -> Response:
        await documents.delete(_tenant(request), document_id)
        return JSONResponse({"id": document_id, "object": "document", "deleted": True})


async def _create(
    frontend: Frontend, request: Request, body: Body, uploaded: Uploaded | None
) -> Response:
    """The answer to a POST, whose source is in the fields or in a file."""
    assert frontend.jobs is not None, "the route exists only with jobs"
    tenant, key = request.scope[SCOPE_TENANT], request.headers.get("idempotency-key")
    document, is_new = await _accept(frontend, tenant, body, uploaded, key)
    summary = frontend.jobs.documents.summarise(document)
    return JSONResponse(summary, status_code=202 if is_new else 200)


async def _accept(
    frontend: Frontend, tenant: Tenant, body: Body, uploaded: Uploaded | None, key: str | None
) -> tuple[Document, bool]:
    jobs, workers = jobs_of(frontend), frontend.workers
    documents = jobs.documents
    now, max_model_len, tiers = documents.table.clock(), frontend.max_model_len, documents.tiers
    task = ReadDocument(tenant, now, max_model_len, tiers, uploaded, key)
    found = await workers.run(tenant.name, task, body)
    if isinstance(found, NeedsFile):
        file = await jobs.files.get(tenant.name, found.file_id, "source")
        path = str(jobs.files.path(file.file_id))
        uploaded = Uploaded(path, file.file_name, False, file.media_type, file.charset)
        task = msgspec.structs.replace(task, uploaded=uploaded)
        found = await workers.run(tenant.name, task, body)
    assert isinstance(found, Asked), found
    source = Source(
        text=found.text,
        prompt=None if found.prompt is None else found.prompt.unpacked(),
        path=None if uploaded is None else Path(uploaded.path),
        is_ours=uploaded is not None and uploaded.is_ours,
    )
    return await documents.create(found.document, source, found.idempotency)


async def make_document(frontend: Frontend, tenant: Tenant, body: Body) -> dict[str, Any]:
    """A document of a line of a batch, when nothing is to be done for it any more.

    Raises:
        RequestError: it cannot be accepted, or has been ended before it was ready.
    """
    jobs = jobs_of(frontend)
    documents = jobs.documents
    # A batch's line is asked again after every start: it must not be able to end each of them.
    named = f"{tenant.name} {body.line and body.line.idempotency_key}".encode()
    key = hashlib.blake2b(named, digest_size=16).hexdigest()
    async with jobs.gate.work(Work(LINE, key)):
        document, _ = await _accept(frontend, tenant, body, None, None)
    while document.state in PENDING:
        wait_s = documents.limits.max_wait_s
        document = await documents.wait(tenant.name, document.document_id, wait_s)
    if document.state in FINAL and document.error is None:
        raise RequestError(f"the document is {document.status}", code="document_not_usable")
    return documents.summarise(document)


async def _whole(documents: Documents, document: Document, status: int = 200) -> Response:
    return JSONResponse(await documents.describe(document), status_code=status)


def _add_looking(app: FastAPI, frontend: Frontend, documents: Documents) -> None:
    @app.get("/v1/documents")
    async def page(request: Request) -> Response:
        query = request.query_params
        limit = int(_number(query.get("limit"), "limit", DEFAULT_PAGE, 1, MAX_PAGE))
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise _invalid("order", "order is asc or desc")
        found, has_more = await documents.page(
            _tenant(request), query.get("after"), limit, is_ascending=order == "asc"
        )
        return JSONResponse(
            {
                "object": "list",
                "data": [documents.summarise(document) for document in found],
                "first_id": found[0].document_id if found else None,
                "last_id": found[-1].document_id if found else None,
                "has_more": has_more,
            }
        )

    @app.get("/v1/documents/{document_id}")
    async def get(request: Request, document_id: str) -> Response:
        wait_s = _number(request.query_params.get("wait"), "wait", 0, 0, math.inf)
        tenant = _tenant(request)
        if wait_s > 0:
            documents.watchers.check(tenant)
            with documents.watchers.watching(tenant):
                document = await documents.wait(tenant, document_id, wait_s)
        else:
            document = await documents.get(tenant, document_id)
        return await _whole(documents, await documents.maintenance.check_blocks(document))

    @app.get("/v1/documents/{document_id}/events")
    async def events(request: Request, document_id: str) -> Response:
        document = await documents.get(_tenant(request), document_id)
        given = request.query_params.get("starting_after") or request.headers.get("last-event-id")
        after = int(_number(given, "starting_after", 0, 0, MAX_SEQUENCE))
        documents.watchers.check(document.tenant)
        return EventStream(documents, frontend.config, document, after)


def _add_steps(app: FastAPI, documents: Documents) -> None:
    @app.post("/v1/documents/{document_id}/cancel")
    async def cancel(request: Request, document_id: str) -> Response:
        document, was_running = await documents.cancel(_tenant(request), document_id)
        return await _whole(documents, document, 202 if was_running else 200)

    @app.post("/v1/documents/{document_id}/resume")
    async def resume(request: Request, document_id: str) -> Response:
        document = await documents.resume(_tenant(request), document_id)
        return await _whole(documents, document, 202)

    @app.post("/v1/documents/{document_id}/retry")  # the same, of what was set aside
    async def retry(request: Request, document_id: str) -> Response:
        document = await documents.resume(_tenant(request), document_id)
        return await _whole(documents, document, 202)

    @app.post("/v1/documents/{document_id}/rewarm")
    async def rewarm(request: Request, document_id: str) -> Response:
        document = await documents.rewarm(_tenant(request), document_id)
        return await _whole(documents, document, 202)


def _number(given: str | None, param: str, default: float, least: float, most: float) -> float:
    """A number from a query; too large a one is taken for the largest.

    Raises:
        RequestError: it is none, or too small.
    """
    if given is None:
        return default
    try:
        value = float(given)
    except ValueError as error:
        raise _invalid(param, f"{param} must be a number") from error
    if not value >= least:  # nor is nan
        raise _invalid(param, f"{param} must be at least {least:g}")
    return min(value, most)


def _invalid(param: str, message: str) -> RequestError:
    return RequestError(message, code="invalid_value", param=param)
