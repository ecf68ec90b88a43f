"""Whether there is room for a document: how many there are, bytes, KV, pins. In a transaction."""

import sqlite3

from coordinator.config import JobLimits
from coordinator.jobs.documents.document import HARD, NO_PIN, Document
from coordinator.jobs.documents.pins import Pinned, PinPolicy
from coordinator.jobs.engine.table import JobTable
from coordinator.jobs.files.quotas import Quota
from protocol.errors import RequestError

BYTES_PER_TOKEN = 4  # of a text, about; until its tokens are known


class Admission:
    """What may be kept of documents. All methods raise ``RequestError`` with the numbers.

    Args:
        table: of the documents.
        limits: how many there may be.
        quota: of each tenant.
        pins: that there is room for.
    """

    def __init__(
        self, table: JobTable[Document], limits: JobLimits, quota: Quota, pins: PinPolicy
    ) -> None:
        self.pins = pins
        self._table = table
        self._limits = limits
        self._quota = quota

    def check_new(self, connection: sqlite3.Connection, document: Document) -> None:
        """Raises ``too_many_documents``, ``too_many_waiting``, or as the other two."""
        tenant, limits = document.tenant, self._limits
        everybody, own = self._table.count(connection, tenant)
        is_own = own >= limits.max_tenant_documents
        if is_own or everybody >= limits.max_documents:
            raise RequestError(
                f"there are {own if is_own else everybody} documents already: delete some first",
                code="too_many_documents",
                status=429,
            )
        self._table.check_pending(
            connection,
            tenant,
            (limits.max_tenant_waiting, limits.max_waiting),
            "too_many_waiting",
            "{} documents wait to be made ready already",
        )
        self._quota.check(connection, tenant, document.num_bytes)
        num_tokens = document.num_tokens or document.num_bytes // BYTES_PER_TOKEN
        self.check_pin(connection, document, num_tokens)

    def check_tokens(self, connection: sqlite3.Connection, document: Document) -> None:
        """Raises ``quota_exceeded`` if its KV is too much, or as ``check_pin``."""
        self.check_pin(connection, document, document.num_tokens)
        self._quota.check(connection, document.tenant, num_tokens=document.num_tokens)

    def check_pin(
        self, connection: sqlite3.Connection, document: Document, num_tokens: int
    ) -> None:
        """Raises ``pin_quota_exceeded``."""
        self.pins.check(document.pin, num_tokens, _pinned_by_others(connection, document))


def _pinned_by_others(connection: sqlite3.Connection, document: Document) -> Pinned:
    everybody, hard, own = connection.execute(
        "SELECT COALESCE(SUM(num_tokens), 0),"
        " COALESCE(SUM(num_tokens) FILTER (WHERE pin_mode = :hard AND tenant = :tenant), 0),"
        " COALESCE(SUM(num_tokens) FILTER (WHERE tenant = :tenant), 0)"
        " FROM job WHERE kind = 'document' AND pin_mode != :none AND job_id != :id",
        {"hard": HARD, "none": NO_PIN, "tenant": document.tenant, "id": document.id},
    ).fetchone()
    return Pinned(everybody, hard, own)
