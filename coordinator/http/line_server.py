"""Answers the lines of batches through the code that answers HTTP requests, without a socket."""

import logging
import time
from typing import Any

from coordinator.auth import Tenant, Tenants
from coordinator.errors import error_object, internal_error
from coordinator.http.documents_api import make_document
from coordinator.http.frontend import Frontend, RequestContext
from coordinator.http.generation import PATHS, generate
from coordinator.jobs.documents.tiering import BACKGROUND
from coordinator.validation.bodies import Body
from protocol.errors import RequestError

_log = logging.getLogger(__name__)


class LineServer:
    """What ``BatchRunner`` asks for, on a coordinator.

    Args:
        frontend: whose answers are given.
        tenants: whom batches belong to.
    """

    def __init__(self, frontend: Frontend, tenants: Tenants) -> None:
        self._frontend = frontend
        self._tenants = tenants

    @property
    def num_interactive(self) -> int | None:
        """Sequences that are not of lines or documents; None while the cluster serves nobody."""
        if not self._frontend.node.is_complete:
            return None
        return self._frontend.service.loads.num_interactive

    async def serve(
        self, tenant: str, url: str, body: Body, request_id: str
    ) -> tuple[int, dict[str, Any]]:
        """Status and body, as HTTP would have them."""
        try:
            return await self._serve(self._tenant(tenant), url, body, request_id)
        except RequestError as error:
            return error.status, error_object(error)
        except Exception:  # noqa: BLE001 - the outermost frame of a line: the next one is answered
            _log.exception("request %s, of a batch, failed by a bug", request_id)
            return 500, error_object(internal_error())

    async def _serve(
        self, tenant: Tenant, url: str, body: Body, request_id: str
    ) -> tuple[int, dict[str, Any]]:
        self._frontend.check_ready()
        if url in PATHS:
            now = time.monotonic()
            context = RequestContext(tenant, request_id, request_id, None, now, priority=BACKGROUND)
            answer = await generate(self._frontend, context, url, body)
            return await answer.gather()
        document = await self.make_document(tenant, body)
        error = document.get("error")
        if error is not None:
            message, code = error.get("message", "the document has failed"), error.get("code")
            raise RequestError(message, code=code or "document_failed", status=422)
        return 200, document

    async def make_document(self, tenant: Tenant, body: Body) -> dict[str, Any]:
        """A document as a POST would have it, when it is ready or has failed. The body has an
        ``idempotency_key``: asked again, it means the same document."""
        return await make_document(self._frontend, tenant, body)

    def _tenant(self, name: str) -> Tenant:
        tenant = self._tenants.named(name)
        if tenant is None:
            raise RequestError(
                "the key that this batch was made with is no longer known",
                code="invalid_api_key",
                status=401,
            )
        return tenant
