"""The HTTP surface: paths to functions. Pydantic and Starlette's types go no further than this.

A request passes the entry (entry.py), then its route. What a route raises as ``RequestError``
becomes OpenAI's error object; so do 404 and 405.
"""

import logging
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from coordinator.auth import SCOPE_TENANT, Tenants
from coordinator.errors import error_object
from coordinator.http.answers.sending import JsonBody
from coordinator.http.batches_api import add_batches
from coordinator.http.cluster_api import describe_cluster, version_info
from coordinator.http.connections.origins import CORS, Origins
from coordinator.http.documents_api import add_documents
from coordinator.http.entry import Entry
from coordinator.http.files_api import add_files
from coordinator.http.frontend import Frontend, RequestContext
from coordinator.http.generation import PATHS, generate
from coordinator.http.metrics import render
from coordinator.text.tasks import Json, ReadDetokenize, ReadTokenize
from coordinator.validation.parameters import check_model
from protocol.errors import RequestError

_log = logging.getLogger(__name__)


def build_app(frontend: Frontend, tenants: Tenants) -> FastAPI:
    """The application that uvicorn serves."""
    app = FastAPI(
        title="Baton", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    config = frontend.config
    app.add_middleware(
        Entry,
        limits=config.limits,
        origins=Origins((config.host, *config.allowed_hosts), config.cors_origins),
        tenants=tenants,
        door=frontend.door,
        turns=frontend.turns,
    )
    if config.cors_origins:  # outermost: what is refused is told to the page as well
        app.add_middleware(CORSMiddleware, allow_origins=config.cors_origins, **CORS)
    app.add_exception_handler(HTTPException, _on_http_exception)
    _add_generation(app, frontend)
    _add_text(app, frontend)
    _add_state(app, frontend)
    add_documents(app, frontend)
    add_files(app, frontend)
    add_batches(app, frontend)
    return app


def _add_generation(app: FastAPI, frontend: Frontend) -> None:
    async def tokens(request: Request) -> Response:
        context = RequestContext.of(request)
        async with frontend.body(request) as body:
            frontend.check_ready()
            return await generate(frontend, context, request.url.path, body)

    for path in PATHS:
        app.add_route(path, tokens, methods=["POST"])

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = frontend.config.model_names
        return {"object": "list", "data": [_model(frontend, name) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        check_model(frontend.config, name)
        return _model(frontend, name)

    @app.get("/v1/requests/{request_id}/timeline")
    async def timeline(request: Request, request_id: str) -> Response:
        told = frontend.traces.find(request_id, request.scope[SCOPE_TENANT].name)
        if told is None:
            raise RequestError("no such request", code="request_not_found", status=404)
        return JsonBody(told)


def _model(frontend: Frontend, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": frontend.started_at,
        "owned_by": "baton",
        "root": frontend.config.model,
        "parent": None,
        "max_model_len": frontend.max_model_len,
        "permission": [],
    }


def _add_text(app: FastAPI, frontend: Frontend) -> None:
    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return await _read(frontend, request, ReadTokenize(frontend.max_model_len))

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return await _read(frontend, request, ReadDetokenize())


async def _read(
    frontend: Frontend, request: Request, task: ReadTokenize | ReadDetokenize
) -> Response:
    """A body for which a text worker has the whole answer."""
    async with frontend.body(request) as body:
        found = await frontend.workers.run(request.scope[SCOPE_TENANT].name, task, body)
    assert isinstance(found, Json), found
    return JsonBody(found.body)


def _add_state(app: FastAPI, frontend: Frontend) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}  # this loop runs: a hung one does not answer

    @app.get("/ready")
    async def ready() -> JSONResponse:
        error = frontend.unready(time.monotonic())
        if error is None:
            return JSONResponse({"ready": True, "reason": "", "code": None})
        body = {"ready": False, "reason": error.message, "code": error.code}
        return JSONResponse(body, status_code=error.status)

    @app.get("/version")
    async def version() -> dict[str, Any]:
        return version_info()

    @app.get("/v1/cluster")
    async def cluster() -> dict[str, Any]:
        return describe_cluster(frontend, time.monotonic())

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        body, content_type = render(frontend, request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        raise RequestError("no such path", code="not_found", status=404)
    if error.status_code != 405:
        raise RequestError(str(error.detail), code="invalid_request", status=error.status_code)
    refused = f"{request.method} is not offered here"
    refusal = RequestError(refused, code="method_not_allowed", status=405)
    return JSONResponse(error_object(refusal), 405, {"allow": (error.headers or {})["Allow"]})
