"""``/v1/batches``, in OpenAI's shape: paths to functions."""

from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from coordinator.http.files_api import MAX_TTL_S, MIN_TTL_S, as_list, read_limit, tenant_of
from coordinator.http.frontend import Frontend
from coordinator.jobs.batches.batch import describe_batch
from coordinator.jobs.batches.batches import Batches, BatchRequest
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
    """Add the routes, if this coordinator has batches."""
    if frontend.batches is None:
        return
    _add_making(app, frontend, frontend.batches)
    _add_looking(app, frontend.batches)


def _add_making(app: FastAPI, frontend: Frontend, batches: Batches) -> None:
    @app.post("/v1/batches")
    async def create(request: Request) -> dict[str, Any]:
        body = validate(BatchBody, await frontend.fields(request))
        expiry = body.output_expires_after
        batch = await batches.create(
            BatchRequest(
                tenant_of(request),
                frontend.config.model_name,
                body.input_file_id,
                body.endpoint,
                body.completion_window,
                body.metadata,
                None if expiry is None else expiry.seconds,
            )
        )
        return describe_batch(batch)

    @app.post("/v1/batches/{batch_id}/cancel")
    async def cancel(request: Request, batch_id: str) -> Response:
        batch, was_running = await batches.cancel(tenant_of(request), batch_id)
        return JSONResponse(describe_batch(batch), status_code=202 if was_running else 200)

    @app.post("/v1/batches/{batch_id}/retry")
    async def retry(request: Request, batch_id: str) -> Response:
        batch = await batches.retry(tenant_of(request), batch_id)
        return JSONResponse(describe_batch(batch), status_code=202)


def _add_looking(app: FastAPI, batches: Batches) -> None:
    @app.get("/v1/batches")
    async def page(request: Request) -> dict[str, Any]:
        query = request.query_params
        limit = read_limit(query.get("limit"), DEFAULT_PAGE, MAX_PAGE)
        found, has_more = await batches.page(tenant_of(request), query.get("after"), limit)
        return as_list([describe_batch(batch) for batch in found], has_more=has_more)

    @app.get("/v1/batches/{batch_id}")
    async def get(request: Request, batch_id: str) -> dict[str, Any]:
        return describe_batch(await batches.get(tenant_of(request), batch_id))
