"""``/v1/batches``, in OpenAI's shape: paths to functions."""

import hashlib
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from coordinator.http.files_api import MAX_TTL_S, MIN_TTL_S
from coordinator.http.frontend import Frontend
from coordinator.http.listing import listed, tenant_of
from coordinator.jobs.batches.batch import describe_batch
from coordinator.jobs.batches.batches import BatchRequest
from coordinator.jobs.engine.table import Idempotency
from coordinator.validation.document_bodies import check_idempotency_key
from coordinator.validation.schemas import validate

MAX_PAGE, DEFAULT_PAGE = 100, 20


class ExpiryBody(BaseModel):
    model_config = ConfigDict(strict=True)

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_TTL_S, le=MAX_TTL_S)]


class BatchBody(BaseModel):
    model_config = ConfigDict(strict=True)

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiryBody | None = None


def add_batches(app: FastAPI, frontend: Frontend) -> None:
    """Add the routes."""
    batches = frontend.jobs.batches

    @app.post("/v1/batches")
    async def create(request: Request) -> dict[str, Any]:
        body = validate(BatchBody, await frontend.fields(request))
        expiry = body.output_expires_after
        asked = BatchRequest(
            tenant=tenant_of(request),
            model=frontend.config.model_name,
            input_file_id=body.input_file_id,
            endpoint=body.endpoint,
            completion_window=body.completion_window,
            metadata=body.metadata,
            output_ttl_s=None if expiry is None else expiry.seconds,
        )
        return describe_batch(await batches.create(asked, _idempotency(request, body)))

    @app.get("/v1/batches")
    async def page(request: Request) -> Response:
        return await listed(request, batches.table.page, describe_batch, DEFAULT_PAGE, MAX_PAGE)

    @app.get("/v1/batches/{batch_id}")
    async def get(request: Request, batch_id: str) -> dict[str, Any]:
        return describe_batch(await batches.table.get(tenant_of(request), batch_id))

    @app.post("/v1/batches/{batch_id}/cancel")
    async def cancel(request: Request, batch_id: str) -> Response:
        batch, was_running = await batches.engine.cancel(tenant_of(request), batch_id)
        return JSONResponse(describe_batch(batch), status_code=202 if was_running else 200)

    @app.post("/v1/batches/{batch_id}/retry")
    async def retry(request: Request, batch_id: str) -> Response:
        batch = await batches.retry(tenant_of(request), batch_id)
        return JSONResponse(describe_batch(batch), status_code=202)


def _idempotency(request: Request, body: BatchBody) -> Idempotency | None:
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    check_idempotency_key(key)
    return Idempotency(key, hashlib.sha256(body.model_dump_json().encode()).digest())
