"""The tables of ``jobs.sqlite``, and the conversion of those that earlier versions have made.

A database has the number of its version. One without a number may be of the versions that kept
documents and batches in tables of their own: it is converted when it is opened first, in the
transaction that opens it, so that it is of one version or of the other. A newer one is refused.
"""

import json
import logging
import sqlite3

import msgspec

from coordinator.jobs.batches.batch import Batch
from coordinator.jobs.batches.states import BatchState
from coordinator.jobs.documents.document import Document
from coordinator.jobs.documents.states import DocumentState
from coordinator.jobs.engine.table import insert_cleanup, insert_row
from protocol.errors import ConfigError

VERSION = 2
KEEP_S = 30 * 86_400  # how long batches of version 1 are kept after their expiry
TABLES = (
    # Jobs of every kind: columns are what queries look for, the last five of documents.
    """CREATE TABLE job (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        job_id TEXT NOT NULL UNIQUE,
        kind TEXT NOT NULL,
        tenant TEXT NOT NULL,
        state TEXT NOT NULL,
        priority INTEGER NOT NULL,
        due_at REAL,
        body BLOB NOT NULL,
        num_bytes INTEGER,
        num_tokens INTEGER,
        kept_tokens INTEGER,
        pin_mode TEXT,
        first_hash TEXT
    )""",
    "CREATE INDEX job_by_tenant ON job (kind, tenant, number)",
    "CREATE INDEX job_by_state ON job (kind, state, priority, number)",
    "CREATE INDEX job_by_time ON job (kind, due_at) WHERE due_at IS NOT NULL",
    "CREATE INDEX job_by_first_hash ON job (first_hash) WHERE first_hash IS NOT NULL",
    """CREATE TABLE event (
        job_id TEXT NOT NULL REFERENCES job (job_id) ON DELETE CASCADE,
        sequence INTEGER NOT NULL,
        at REAL NOT NULL,
        kind TEXT NOT NULL,
        data BLOB NOT NULL,
        PRIMARY KEY (job_id, sequence)
    ) WITHOUT ROWID""",
    """CREATE TABLE idempotency_key (
        tenant TEXT NOT NULL,
        key TEXT NOT NULL,
        request_digest BLOB NOT NULL,
        job_id TEXT NOT NULL REFERENCES job (job_id) ON DELETE CASCADE,
        created_at REAL NOT NULL,
        PRIMARY KEY (tenant, key)
    ) WITHOUT ROWID""",
    # Jobs that were deleted or have ended, and have left something to be put away.
    """CREATE TABLE cleanup (
        job_id TEXT PRIMARY KEY,
        kind TEXT NOT NULL,
        body BLOB NOT NULL
    ) WITHOUT ROWID""",
    """CREATE TABLE line (
        batch_id TEXT NOT NULL REFERENCES job (job_id) ON DELETE CASCADE,
        line INTEGER NOT NULL,
        offset INTEGER NOT NULL,
        size INTEGER NOT NULL,
        custom_id TEXT NOT NULL,
        url TEXT NOT NULL,
        depends_on INTEGER,
        is_done INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (batch_id, line)
    ) WITHOUT ROWID""",
    "CREATE INDEX line_left ON line (batch_id, line) WHERE is_done = 0",
    """CREATE TABLE result (
        batch_id TEXT NOT NULL REFERENCES job (job_id) ON DELETE CASCADE,
        line INTEGER NOT NULL,
        is_error INTEGER NOT NULL,
        document_id TEXT,
        text BLOB NOT NULL,
        PRIMARY KEY (batch_id, line)
    )""",
    """CREATE TABLE IF NOT EXISTS file (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        file_id TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL,
        purpose TEXT NOT NULL,
        file_name TEXT NOT NULL,
        size_bytes INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        expires_at INTEGER,
        media_type TEXT NOT NULL DEFAULT '',
        charset TEXT NOT NULL DEFAULT ''
    )""",
    "CREATE INDEX IF NOT EXISTS file_of_tenant ON file (tenant, sequence)",
    "CREATE INDEX IF NOT EXISTS file_expiry ON file (expires_at) WHERE expires_at IS NOT NULL",
    # Of engine/gate.py: work on board of deaths of this process, and those deaths.
    """CREATE TABLE suspect (
        kind TEXT NOT NULL,
        key TEXT NOT NULL,
        body BLOB NOT NULL,
        PRIMARY KEY (kind, key)
    ) WITHOUT ROWID""",
    "CREATE TABLE death (life TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID",
)
# A version that knows only its own tables must not start here: it would take all files for left
# over. It cannot make its indices on a view, and ends with an error.
_GUARD = "CREATE VIEW documents AS SELECT 'this data folder is of a newer version' AS body"
_log = logging.getLogger(__name__)


def prepare(connection: sqlite3.Connection) -> None:
    """Make the tables that are not there, or convert those of an earlier version.

    Raises:
        ConfigError: a newer version has made them.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise ConfigError(f"it is of a newer version of Baton ({version}, not {VERSION})")
    if version == VERSION:
        return
    is_old = "documents" in _tables(connection)
    for statement in TABLES:
        connection.execute(statement)
    if is_old:
        _convert(connection)
    connection.execute(_GUARD)
    connection.execute(f"PRAGMA user_version = {VERSION}")


def _tables(connection: sqlite3.Connection) -> set[str]:
    query = "SELECT name FROM sqlite_master WHERE type = 'table'"
    return {name for (name,) in connection.execute(query)}


# -- version 1 -------------------------------------------------------------------------------------


def _convert(connection: sqlite3.Connection) -> None:
    """Documents, batches and what belongs to them, from the tables of version 1."""
    query = (
        "SELECT document_id, tenant, status, body, coalesce(num_bytes, 0) FROM documents"
        " LEFT JOIN document_sizes USING (document_id, tenant) ORDER BY number"
    )
    for document_id, tenant, status, body, num_bytes in connection.execute(query).fetchall():
        try:
            insert_row(connection, _document(body, num_bytes))
        except (ValueError, msgspec.ValidationError) as error:  # it stays as unreadable as it is
            _log.error("%s is kept as it is: %s", document_id, error)
            row = (document_id, Document.KIND, tenant, status, 0, body)
            names = "job_id, kind, tenant, state, priority, body"
            connection.execute(f"INSERT INTO job ({names}) VALUES (?, ?, ?, ?, ?, ?)", row)
    for (body,) in connection.execute("SELECT body FROM deleted_documents").fetchall():
        insert_cleanup(connection, _document(body, 0))
    for (fields,) in connection.execute("SELECT fields FROM batch ORDER BY sequence").fetchall():
        batch = _batch(fields)
        insert_row(connection, batch)
        if batch.state in Batch.CLEANED:
            insert_cleanup(connection, batch)
    for statement in _MOVES:
        connection.execute(statement)
    _log.warning("the data folder is of an earlier version: its jobs were converted")


_MOVES = (
    "INSERT INTO event SELECT document_id, sequence, at, kind, data FROM document_events",
    "INSERT INTO idempotency_key"
    " SELECT tenant, idempotency_key, request_digest, document_id, created_at FROM document_keys",
    "INSERT INTO line SELECT batch_id, line, offset, size, custom_id, url, depends_on, is_done"
    " FROM batch_line",
    "INSERT INTO result SELECT batch_id, line, is_error, document_id, text FROM batch_result",
    "ALTER TABLE file ADD COLUMN media_type TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE file ADD COLUMN charset TEXT NOT NULL DEFAULT ''",
    "UPDATE file SET media_type = t.media_type, charset = t.charset FROM file_type AS t"
    " WHERE t.file_id = file.file_id",
    *(
        f"DROP TABLE {name}"
        for name in (
            *("file_type", "document_events", "document_keys", "document_sizes", "documents"),
            *("deleted_documents", "document_owners", "batch_result", "batch_line", "batch"),
            *("suspects", "deaths"),  # what an older version died of is tried again
        )
    ),
)


def _document(body: bytes, num_bytes: int) -> Document:
    fields = json.loads(body)
    fields["id"], fields["state"] = fields.pop("document_id"), fields.pop("status", "queued")
    ready_at = fields.pop("ready_at", None)
    fields["times"] = {} if ready_at is None else {DocumentState.READY.value: ready_at}
    return msgspec.convert({**fields, "num_bytes": num_bytes}, Document)


def _batch(body: bytes) -> Batch:
    fields = json.loads(body)
    fields["id"] = fields.pop("batch_id")
    fields["times"] = {name.removesuffix("_at"): at for name, at in fields["times"].items()}
    fields["keep_until"] = fields["expires_at"] + KEEP_S
    if fields["state"] == BatchState.SET_ASIDE.value and fields["errors"]:
        why = fields.pop("errors")[0]
        fields["error"] = {"code": why["code"], "message": why["message"]}
    return msgspec.convert(fields, Batch)
