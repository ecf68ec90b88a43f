"""``/v1/documents``: paths to functions.

A multipart upload is streamed to the disk by the code that reads files for ``/v1/files``; what
arrives here is a file that is ours to move.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from coordinator.auth import SCOPE_TENANT, Tenant
from coordinator.http.document_events import EventStream
from coordinator.http.entry import SCOPE_IS_UPLOAD
from coordinator.http.frontend import Frontend
from coordinator.http.listing import listed, read_number, tenant_of
from coordinator.jobs.documents.document import Document
from coordinator.jobs.documents.documents import Documents, Source
from coordinator.jobs.documents.states import FINAL
from coordinator.jobs.engine.suspects import LINE, Work
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

MAX_PAGE, DEFAULT_PAGE = 100, 20
MAX_SEQUENCE = 2**53


def add_documents(app: FastAPI, frontend: Frontend) -> None:
    """Add the routes."""
    documents = frontend.jobs.documents
    _add_making(app, frontend, documents)
    _add_looking(app, frontend, documents)
    _add_steps(app, documents)


def _add_making(app: FastAPI, frontend: Frontend, documents: Documents) -> None:
    @app.post("/v1/documents")
    async def create(request: Request) -> Response:
        if not request.scope.get(SCOPE_IS_UPLOAD):
            async with frontend.body(request) as body:
                return await _create(frontend, request, body, None)
        async with frontend.upload(request, documents.folder) as upload:
            uploaded = Uploaded(
                path=str(upload.path),
                file_name=upload.file_name,
                is_ours=True,
                media_type=upload.media_type,
                charset=upload.charset,
            )
            fields = fields_of_form(upload.fields, frontend.config.limits)
            return await _create(frontend, request, Body(msgspec.json.encode(fields)), uploaded)

    @app.patch("/v1/documents/{document_id}")
    async def update(request: Request, document_id: str) -> Response:
        body = validate(UpdateBody, await frontend.fields(request))
        pin = None
        if body.pin is not None:
            pin = as_pin(body.pin, documents.limits, documents.tiers)
        metadata = body.metadata
        if metadata is not None:
            check_metadata(metadata, frontend.config.limits.max_label_chars)
        document = await documents.update(tenant_of(request), document_id, pin, metadata)
        return await _whole(documents, document)

    @app.delete("/v1/documents/{document_id}")
    async def delete(request: Request, document_id: str) -> Response:
        await documents.engine.delete(tenant_of(request), document_id)
        return JSONResponse({"id": document_id, "object": "document", "deleted": True})


async def _create(
    frontend: Frontend, request: Request, body: Body, uploaded: Uploaded | None
) -> Response:
    """The answer to a POST, whose source is in the fields or in a file."""
    tenant, key = request.scope[SCOPE_TENANT], request.headers.get("idempotency-key")
    document, is_new = await _accept(frontend, tenant, body, uploaded, key)
    summary = frontend.jobs.documents.summarise(document)
    return JSONResponse(summary, status_code=202 if is_new else 200)


async def _accept(
    frontend: Frontend, tenant: Tenant, body: Body, uploaded: Uploaded | None, key: str | None
) -> tuple[Document, bool]:
    jobs, workers = frontend.jobs, frontend.workers
    documents = jobs.documents
    now, max_model_len, tiers = documents.table.clock(), frontend.max_model_len, documents.tiers
    task = ReadDocument(
        tenant=tenant,
        now=now,
        max_model_len=max_model_len,
        tiers=tiers,
        uploaded=uploaded,
        header_key=key,
    )
    found = await workers.run(tenant.name, task, body)
    if isinstance(found, NeedsFile):
        file = await jobs.files.get(tenant.name, found.file_id, "source")
        path = str(jobs.files.path(file.file_id))
        uploaded = Uploaded(
            path=path,
            file_name=file.file_name,
            is_ours=False,
            media_type=file.media_type,
            charset=file.charset,
        )
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
    jobs = frontend.jobs
    documents = jobs.documents
    # A batch's line is asked again after every start: it must not be able to end each of them.
    named = f"{tenant.name} {body.line and body.line.idempotency_key}".encode()
    key = hashlib.blake2b(named, digest_size=16).hexdigest()
    async with jobs.gate.work(Work(LINE, key)):
        document, _ = await _accept(frontend, tenant, body, None, None)
    while document.is_pending:
        wait_s = documents.limits.max_wait_s
        document = await documents.engine.wait(tenant.name, document.id, wait_s)
    if document.state in FINAL and document.error is None:
        raise RequestError(f"the document is {document.state.value}", code="document_not_usable")
    return documents.summarise(document)


async def _whole(documents: Documents, document: Document, status: int = 200) -> Response:
    return JSONResponse(await documents.describe(document), status_code=status)


def _add_looking(app: FastAPI, frontend: Frontend, documents: Documents) -> None:
    @app.get("/v1/documents")
    async def page(request: Request) -> Response:
        return await listed(
            request, documents.table.page, documents.summarise, DEFAULT_PAGE, MAX_PAGE
        )

    @app.get("/v1/documents/{document_id}")
    async def get(request: Request, document_id: str) -> Response:
        wait_s = read_number(request.query_params.get("wait"), "wait", math.inf)
        tenant, watchers = tenant_of(request), documents.engine.watchers
        if wait_s > 0:
            watchers.check(tenant)
            with watchers.watching(tenant):
                document = await documents.engine.wait(tenant, document_id, wait_s)
        else:
            document = await documents.table.get(tenant, document_id)
        return await _whole(documents, await documents.checked(document))

    @app.get("/v1/documents/{document_id}/events")
    async def events(request: Request, document_id: str) -> Response:
        document = await documents.table.get(tenant_of(request), document_id)
        given = request.query_params.get("starting_after") or request.headers.get("last-event-id")
        after = int(read_number(given, "starting_after", MAX_SEQUENCE))
        documents.engine.watchers.check(document.tenant)
        return EventStream(documents.engine, frontend.config, document, after)


def _add_steps(app: FastAPI, documents: Documents) -> None:
    @app.post("/v1/documents/{document_id}/cancel")
    async def cancel(request: Request, document_id: str) -> Response:
        document, was_running = await documents.engine.cancel(tenant_of(request), document_id)
        return await _whole(documents, document, 202 if was_running else 200)

    @app.post("/v1/documents/{document_id}/retry")  # of what was set aside
    @app.post("/v1/documents/{document_id}/resume")
    async def resume(request: Request, document_id: str) -> Response:
        document = await documents.resume(tenant_of(request), document_id)
        return await _whole(documents, document, 202)

    @app.post("/v1/documents/{document_id}/rewarm")
    async def rewarm(request: Request, document_id: str) -> Response:
        document = await documents.rewarm(tenant_of(request), document_id)
        return await _whole(documents, document, 202)
