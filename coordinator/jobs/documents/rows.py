"""How documents lie in the database: tables, and rows to values and back. Inside a transaction."""

import logging
import sqlite3
from collections.abc import Iterable

import msgspec

from coordinator.jobs import quotas
from coordinator.jobs.documents import events
from coordinator.jobs.documents.document import HARD, NO_PIN, Document
from coordinator.jobs.documents.pins import Pinned
from coordinator.jobs.documents.states import FINAL, DocumentState
from coordinator.jobs.files import SCHEMA as FILE_SCHEMA
from protocol.errors import BatonError, RequestError

SCHEMA = (
    """CREATE TABLE IF NOT EXISTS documents (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        document_id TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL,
        status TEXT NOT NULL,
        priority INTEGER NOT NULL,
        deadline REAL,
        pin_mode TEXT NOT NULL,
        pin_expires_at REAL NOT NULL,
        num_tokens INTEGER NOT NULL,
        first_hash TEXT NOT NULL,
        body BLOB NOT NULL
    )""",
    "CREATE INDEX IF NOT EXISTS documents_by_tenant ON documents (tenant, number)",
    "CREATE INDEX IF NOT EXISTS documents_by_status ON documents (status, priority, number)",
    "CREATE INDEX IF NOT EXISTS documents_by_first_hash ON documents (first_hash)",
    """CREATE TABLE IF NOT EXISTS document_keys (
        tenant TEXT NOT NULL,
        idempotency_key TEXT NOT NULL,
        request_digest BLOB NOT NULL,
        document_id TEXT NOT NULL REFERENCES documents (document_id) ON DELETE CASCADE,
        created_at REAL NOT NULL,
        PRIMARY KEY (tenant, idempotency_key)
    ) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS deleted_documents (
        document_id TEXT PRIMARY KEY,
        body BLOB NOT NULL
    ) WITHOUT ROWID""",
    "CREATE TABLE IF NOT EXISTS document_owners (epoch INTEGER PRIMARY KEY AUTOINCREMENT)",
    *events.SCHEMA,
    *quotas.SCHEMA,
    *FILE_SCHEMA,  # files count against the same quota
)
_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Document)
_log = logging.getLogger(__name__)


class Superseded(BatonError):
    """Another process works with this database now: this one must not write to it any more."""


def claim(connection: sqlite3.Connection) -> int:
    """Become the one process that writes; its number."""
    connection.execute("INSERT INTO document_owners DEFAULT VALUES")
    (epoch,) = connection.execute("SELECT MAX(epoch) FROM document_owners").fetchone()
    connection.execute("DELETE FROM document_owners WHERE epoch < ?", (epoch,))
    return int(epoch)


def check_owner(connection: sqlite3.Connection, epoch: int) -> None:
    """Raises Superseded when another process has come since."""
    (newest,) = connection.execute("SELECT MAX(epoch) FROM document_owners").fetchone()
    if newest != epoch:
        raise Superseded(f"process {newest} works with this database, we are {epoch}")


def named(states: frozenset[DocumentState]) -> str:
    """A list of states in SQL."""
    return ", ".join(sorted(f"'{state.value}'" for state in states))


def encode(document: Document) -> bytes:
    return _ENCODER.encode(document)


def decode(body: bytes) -> Document:
    """The document of a row.

    Raises:
        RequestError: ``document_damaged``: the row is not what this version writes.
    """
    try:
        return _DECODER.decode(body)
    except msgspec.DecodeError as error:
        raise RequestError(
            f"the record of this document cannot be read: {error}",
            code="document_damaged",
            status=500,
        ) from error


def decoded(found: Iterable[tuple[bytes]]) -> list[Document]:
    """The documents of many rows; one that cannot be read does not keep the others from it."""
    documents = []
    for (body,) in found:
        try:
            documents.append(decode(body))
        except RequestError as error:
            _log.error("a document is passed over: %s", error)
    return documents


def columns(document: Document) -> tuple[object, ...]:
    """What is looked for, beside the whole."""
    return (
        document.status,
        document.priority,
        document.deadline,
        document.pin.mode,
        document.pin.expires_at,
        document.num_tokens,
        document.first_hash,
        encode(document),
    )


def find(connection: sqlite3.Connection, document_id: str) -> Document | None:
    row = connection.execute(
        "SELECT body FROM documents WHERE document_id = ?", (document_id,)
    ).fetchone()
    return None if row is None else decode(row[0])


def number(connection: sqlite3.Connection, tenant: str, document_id: str) -> int:
    row = connection.execute(
        "SELECT number FROM documents WHERE document_id = ? AND tenant = ?", (document_id, tenant)
    ).fetchone()
    if row is None:
        raise not_found("after")
    number: int = row[0]
    return number


def pinned(connection: sqlite3.Connection, document: Document) -> Pinned:
    """What other documents have pinned; ended ones hold nothing."""
    everybody, hard, own = connection.execute(
        "SELECT COALESCE(SUM(num_tokens), 0), COALESCE(SUM(num_tokens)"
        " FILTER (WHERE pin_mode = ? AND tenant = ?), 0), COALESCE(SUM(num_tokens)"
        " FILTER (WHERE tenant = ?), 0) FROM documents"
        f" WHERE pin_mode != ? AND status NOT IN ({named(FINAL)}) AND document_id != ?",
        (HARD, document.tenant, document.tenant, NO_PIN, document.document_id),
    ).fetchone()
    return Pinned(everybody, hard, own)


def not_found(param: str | None = None) -> RequestError:
    """Of an id that is unknown, malformed or another tenant's: nobody learns which."""
    return RequestError("no such document", code="document_not_found", param=param, status=404)
