"""What one tenant may keep on the disk: texts, files and KV together. Inside of a transaction."""

import sqlite3
from dataclasses import dataclass

from protocol.errors import RequestError


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
        self, connection: sqlite3.Connection, tenant: str, num_bytes: int = 0, num_tokens: int = 0
    ) -> None:
        """Whether there is room for so many bytes, and the KV of so many tokens, more.

        Raises:
            RequestError: ``quota_exceeded``, with the numbers.
        """
        if not self.max_bytes:
            return
        texts, tokens, files = connection.execute(
            "SELECT COALESCE(SUM(num_bytes), 0), COALESCE(SUM(kept_tokens), 0),"
            " (SELECT COALESCE(SUM(size_bytes), 0) FROM file WHERE tenant = :name)"
            " FROM job WHERE kind = 'document' AND tenant = :name",
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
