"""``/v1/files``, in OpenAI's shape: paths to functions."""

import asyncio
from functools import partial
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from coordinator.errors import invalid_value
from coordinator.http.connections.connection import SCOPE_ABORT
from coordinator.http.frontend import Frontend
from coordinator.http.listing import listed, tenant_of
from coordinator.http.uploads import Upload
from coordinator.jobs.files.files import BATCH, Files, StoredFile, new_file_id
from coordinator.loop.timeouts import patient
from protocol.errors import RequestError

PURPOSES = (BATCH, "user_data", "assistants")  # that are of use here; batches write batch_output
MAX_PAGE = 10_000
MIN_TTL_S, MAX_TTL_S = 3600, 30 * 86_400  # OpenAI's
READ_BYTES = 256 << 10


def add_files(app: FastAPI, frontend: Frontend) -> None:
    """Add the routes."""
    files = frontend.jobs.files

    @app.post("/v1/files")
    async def create(request: Request) -> dict[str, Any]:
        async with frontend.upload(request, files.folder.path) as upload:
            file = _as_file(files, tenant_of(request), upload)
            return describe_file(await files.add(file, upload.path))

    @app.get("/v1/files")
    async def page(request: Request) -> Response:
        read = partial(files.page, purpose=request.query_params.get("purpose"))
        return await listed(request, read, describe_file, MAX_PAGE, MAX_PAGE)

    @app.get("/v1/files/{file_id}")
    async def get(request: Request, file_id: str) -> dict[str, Any]:
        return describe_file(await files.get(tenant_of(request), file_id))

    @app.get("/v1/files/{file_id}/content")
    async def content(request: Request, file_id: str) -> Response:
        file = await files.get(tenant_of(request), file_id)
        return _Content(files, file, frontend.config.send_timeout_s)

    @app.delete("/v1/files/{file_id}")
    async def delete(request: Request, file_id: str) -> dict[str, Any]:
        await files.delete(tenant_of(request), file_id)
        return {"id": file_id, "object": "file", "deleted": True}


class _Content(Response):
    """The bytes of a file, as fast as they are taken."""

    def __init__(self, files: Files, file: StoredFile, send_timeout_s: float) -> None:
        super().__init__()
        self._path = files.path(file.file_id)
        self._file = file
        self._send_timeout_s = send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        try:
            stream = await asyncio.to_thread(self._path.open, "rb")
        except FileNotFoundError as error:  # deleted in this moment
            raise RequestError("no such file", code="file_not_found", status=404) from error
        name = quote(self._file.file_name, safe="")
        headers = [
            (b"content-type", b"application/octet-stream"),
            (b"content-length", str(self._file.size_bytes).encode()),
            (b"content-disposition", f"attachment; filename*=UTF-8''{name}".encode()),
        ]
        with stream:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                while piece := await asyncio.to_thread(stream.read, READ_BYTES):
                    async with patient(self._send_timeout_s):
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
            except TimeoutError:  # the reader takes nothing
                scope[SCOPE_ABORT]()
                return
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def describe_file(file: StoredFile) -> dict[str, Any]:
    """A file as callers see it."""
    return {
        "id": file.file_id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.file_name,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def _as_file(files: Files, tenant: str, upload: Upload) -> StoredFile:
    purpose = upload.fields.get("purpose")
    if purpose is None:
        raise RequestError("purpose is missing", code="missing_required_parameter", param="purpose")
    if purpose not in PURPOSES:
        raise invalid_value("purpose", f"purpose must be one of {', '.join(PURPOSES)}")
    now = int(files.clock())
    ttl_s = _ttl(upload.fields)
    if ttl_s is None and purpose == BATCH:
        ttl_s = int(files.limits.file_ttl_s)
    return StoredFile(
        file_id=new_file_id(),
        tenant=tenant,
        purpose=purpose,
        file_name=upload.file_name,
        size_bytes=upload.size_bytes,
        created_at=now,
        expires_at=None if ttl_s is None else now + ttl_s,
        media_type=upload.media_type,
        charset=upload.charset,
    )


def _ttl(fields: dict[str, str]) -> int | None:
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise invalid_value("expires_after", "expires_after[anchor] must be created_at")
    digits = (seconds or "")[:16]
    if not (digits.isascii() and digits.isdigit() and MIN_TTL_S <= int(digits) <= MAX_TTL_S):
        raise invalid_value(
            "expires_after", f"expires_after[seconds] is between {MIN_TTL_S} and {MAX_TTL_S}"
        )
    return int(digits)
