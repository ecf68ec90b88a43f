"""What one tenant may keep on the disk: texts, files and KV together. Inside a transaction."""

import sqlite3
from dataclasses import dataclass

from coordinator.jobs.documents.states import DocumentState
from protocol.errors import RequestError

SCHEMA = (
    """CREATE TABLE IF NOT EXISTS document_sizes (
        document_id TEXT PRIMARY KEY REFERENCES documents (document_id) ON DELETE CASCADE,
        tenant TEXT NOT NULL,
        num_bytes INTEGER NOT NULL
    ) WITHOUT ROWID""",
    "CREATE INDEX IF NOT EXISTS document_sizes_by_tenant ON document_sizes (tenant, num_bytes)",
)
_KEPT = ", ".join(
    f"'{s.value}'" for s in (DocumentState.PREFILLING, DocumentState.STORING, DocumentState.READY)
)


@dataclass(frozen=True, slots=True)
class Quota:
    """Bytes of one tenant's, on the disk.

    Args:
        max_bytes: 0 for any number.
        bytes_per_token: of KV.
    """

    max_bytes: int
    bytes_per_token: int

    def check(
        self,
        connection: sqlite3.Connection,
        tenant: str,
        num_bytes: int = 0,
        num_tokens: int = 0,
    ) -> None:
        """Whether there is room for so many bytes, and the KV of so many tokens, more.

        Raises:
            RequestError: ``quota_exceeded``, with the numbers.
        """
        if not self.max_bytes:
            return
        texts, files, tokens = connection.execute(
            "SELECT (SELECT COALESCE(SUM(num_bytes), 0) FROM document_sizes WHERE tenant = :name),"
            " (SELECT COALESCE(SUM(size_bytes), 0) FROM file WHERE tenant = :name),"
            " (SELECT COALESCE(SUM(num_tokens), 0) FROM documents"
            f"  WHERE tenant = :name AND status IN ({_KEPT}))",
            {"name": tenant},
        ).fetchone()
        kv = tokens * self.bytes_per_token
        needed = num_bytes + num_tokens * self.bytes_per_token
        if texts + files + kv + needed > self.max_bytes:
            raise RequestError(
                f"you keep {texts} bytes of documents' sources, {files} of files and {kv} of KV; "
                f"with {needed} more that is above {self.max_bytes}: delete something first",
                code="quota_exceeded",
                status=403,
            )


NO_QUOTA = Quota(0, 0)
