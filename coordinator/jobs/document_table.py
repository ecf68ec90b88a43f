"""The documents in the database. Every change is one transaction: a new value, and its events.

Whoever changes a document says how its next value follows from the present one; that is worked out
inside the transaction, so two changes never build on the same value, and a step that another one
has made impossible raises ``IllegalTransition`` and changes nothing.
"""

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from coordinator.config import JobLimits
from coordinator.jobs import events
from coordinator.jobs.database import Database
from coordinator.jobs.document import HARD, NO_PIN, Change, Document, state_event
from coordinator.jobs.pins import Pinned
from coordinator.jobs.states import PENDING, State
from protocol.errors import RequestError

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
    *events.SCHEMA,
)
_PENDING = ", ".join(f"'{state.value}'" for state in sorted(PENDING, key=lambda s: s.value))
_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Document)


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A caller's promise that requests with this key are one; the digest is of what it asks."""

    key: str
    digest: bytes


class DocumentTable:
    """All documents.

    Args:
        database: with ``SCHEMA``.
        limits: how many there may be.
        clock: Unix time, for what callers see.
    """

    def __init__(self, database: Database, limits: JobLimits, clock: Callable[[], float]) -> None:
        self.bell = events.Bell()
        self._database = database
        self._limits = limits
        self.clock = clock

    # -- changing ----------------------------------------------------------------------------------

    async def insert(
        self,
        document: Document,
        idempotency: Idempotency | None,
        check_pin: Callable[[Pinned], None],
    ) -> tuple[Document, bool]:
        """Keep a new document; or find the one that an earlier request with the same key has made.

        Returns:
            It, and whether it is new.

        Raises:
            RequestError: ``idempotency_conflict``, ``too_many_documents``, or what ``check_pin``
                raises.
        """

        def work(connection: sqlite3.Connection) -> tuple[Document, bool]:
            if idempotency is not None:
                known = self._known(connection, document.tenant, idempotency)
                if known is not None:
                    return known, False
            self._check_number(connection, document.tenant)
            check_pin(_pinned(connection, document))
            connection.execute(
                "INSERT INTO documents (document_id, tenant, status, priority, deadline, pin_mode,"
                " pin_expires_at, num_tokens, first_hash, body) VALUES (?,?,?,?,?,?,?,?,?,?)",
                (document.document_id, document.tenant, *_columns(document)),
            )
            if idempotency is not None:
                connection.execute(
                    "INSERT INTO document_keys VALUES (?, ?, ?, ?, ?)",
                    (
                        document.tenant,
                        idempotency.key,
                        idempotency.digest,
                        document.document_id,
                        self.clock(),
                    ),
                )
            self._tell(connection, Change(document, (state_event(document),)))
            return document, True

        return await self._database.write(work)

    async def change(
        self,
        document_id: str,
        work: Callable[[Document], Change],
        check_pin: Callable[[Document, Pinned], None] | None = None,
    ) -> Document:
        """The document after a change.

        Args:
            document_id: which.
            work: pure: the change, from the present value.
            check_pin: whether there is room for the pin of the next value.

        Raises:
            RequestError: there is no such document, or what ``work`` and ``check_pin`` raise.
            IllegalTransition: from ``work``; nothing is changed.
        """

        def transaction(connection: sqlite3.Connection) -> Document:
            document = _find(connection, document_id)
            if document is None:
                raise not_found()
            change = work(document)
            if check_pin is not None:
                check_pin(change.document, _pinned(connection, change.document))
            if change.document != document:
                connection.execute(
                    "UPDATE documents SET status = ?, priority = ?, deadline = ?, pin_mode = ?,"
                    " pin_expires_at = ?, num_tokens = ?, first_hash = ?, body = ?"
                    " WHERE document_id = ?",
                    (*_columns(change.document), document_id),
                )
            self._tell(connection, change)
            return change.document

        following = await self._database.write(transaction)
        self.bell.ring(document_id)
        return following

    async def delete(self, document_id: str) -> Document:
        """Drop a document; that its KV and files are to be removed is remembered until they are.

        Raises:
            RequestError: there is no such document.
        """

        def work(connection: sqlite3.Connection) -> Document:
            document = _find(connection, document_id)
            if document is None:
                raise not_found()
            connection.execute(
                "INSERT INTO deleted_documents VALUES (?, ?)",
                (document_id, _ENCODER.encode(document)),
            )
            connection.execute("DELETE FROM documents WHERE document_id = ?", (document_id,))
            return document

        document = await self._database.write(work)
        self.bell.ring(document_id)
        return document

    async def finish_deletion(self, document_id: str) -> None:
        """Nothing is left of a deleted document."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(
                "DELETE FROM deleted_documents WHERE document_id = ?", (document_id,)
            )

        await self._database.write(work)

    # -- looking -----------------------------------------------------------------------------------

    async def find(self, document_id: str) -> Document | None:
        return await self._database.read(lambda connection: _find(connection, document_id))

    async def page(
        self, tenant: str, after: str | None, limit: int, *, is_ascending: bool
    ) -> tuple[list[Document], bool]:
        """A tenant's documents in the order of their making, and whether there are more.

        Raises:
            RequestError: ``after`` is no document of the tenant's.
        """

        def work(connection: sqlite3.Connection) -> tuple[list[Document], bool]:
            comparison, order = (">", "ASC") if is_ascending else ("<", "DESC")
            place = _number(connection, tenant, after) if after is not None else None
            where = "" if place is None else f" AND number {comparison} {place}"
            rows = connection.execute(
                f"SELECT body FROM documents WHERE tenant = ?{where}"
                f" ORDER BY number {order} LIMIT ?",
                (tenant, limit + 1),
            ).fetchall()
            return [_DECODER.decode(body) for (body,) in rows[:limit]], len(rows) > limit

        return await self._database.read(work)

    async def with_states(
        self, states: frozenset[State], *, limit: int = -1, after: str = ""
    ) -> list[Document]:
        """Documents of any tenant, in the order in which they are to be worked on.

        Args:
            states: any of them.
            limit: no more than these.
            after: the ids above this one, in the order of ids: for going through them in turns.
        """
        names = ", ".join(f"'{state.value}'" for state in states)
        order = "document_id" if after else "priority DESC, number"

        def work(connection: sqlite3.Connection) -> list[Document]:
            rows = connection.execute(
                f"SELECT body FROM documents WHERE status IN ({names}) AND document_id > ?"
                f" ORDER BY {order} LIMIT ?",
                (after, limit),
            )
            return [_DECODER.decode(body) for (body,) in rows]

        return await self._database.read(work)

    async def due(self, now: float) -> list[Document]:
        """Documents whose pin or whose deadline is over."""

        def work(connection: sqlite3.Connection) -> list[Document]:
            rows = connection.execute(
                f"SELECT body FROM documents WHERE (pin_expires_at > 0 AND pin_expires_at <= ?)"
                f" OR (status IN ({_PENDING}) AND deadline <= ?)",
                (now, now),
            )
            return [_DECODER.decode(body) for (body,) in rows]

        return await self._database.read(work)

    async def pinned_documents(self) -> list[Document]:
        """Documents with a pin, of any tenant."""
        return await self._select("pin_mode != ?", NO_PIN)

    async def sharing(self, first_hash: str) -> list[Document]:
        """Documents that begin with the same block."""
        return await self._select("first_hash = ?", first_hash)

    async def _select(self, condition: str, value: str) -> list[Document]:
        def work(connection: sqlite3.Connection) -> list[Document]:
            rows = connection.execute(f"SELECT body FROM documents WHERE {condition}", (value,))
            return [_DECODER.decode(body) for (body,) in rows]

        return await self._database.read(work)

    async def ids(self) -> set[str]:
        """Of all documents, deleted ones that are not put away yet included."""

        def work(connection: sqlite3.Connection) -> set[str]:
            rows = connection.execute(
                "SELECT document_id FROM documents UNION SELECT document_id FROM deleted_documents"
            )
            return {document_id for (document_id,) in rows}

        return await self._database.read(work)

    async def deletions(self) -> list[Document]:
        """Deleted documents whose KV and files are still to be removed."""

        def work(connection: sqlite3.Connection) -> list[Document]:
            rows = connection.execute("SELECT body FROM deleted_documents")
            return [_DECODER.decode(body) for (body,) in rows]

        return await self._database.read(work)

    async def events(
        self, document_id: str, starting_after: int, limit: int = 100
    ) -> list[events.WrittenEvent]:
        """A document's events after a number."""
        return await self._database.read(
            lambda connection: events.read(connection, document_id, starting_after, limit)
        )

    # -- inside a transaction ----------------------------------------------------------------------

    def _tell(self, connection: sqlite3.Connection, change: Change) -> None:
        if change.events:
            document_id = change.document.document_id
            max_events = self._limits.max_events
            events.append(connection, document_id, change.events, self.clock(), max_events)

    def _known(
        self, connection: sqlite3.Connection, tenant: str, idempotency: Idempotency
    ) -> Document | None:
        connection.execute(
            "DELETE FROM document_keys WHERE created_at < ?",
            (self.clock() - self._limits.idempotency_s,),
        )
        row = connection.execute(
            "SELECT request_digest, document_id FROM document_keys"
            " WHERE tenant = ? AND idempotency_key = ?",
            (tenant, idempotency.key),
        ).fetchone()
        if row is None:
            return None
        digest, document_id = row
        if digest != idempotency.digest:
            raise RequestError(
                "this idempotency key was used for another request: use a new one",
                code="idempotency_conflict",
                param="idempotency_key",
                status=409,
            )
        return _find(connection, document_id)

    def _check_number(self, connection: sqlite3.Connection, tenant: str) -> None:
        everybody, own = connection.execute(
            "SELECT COUNT(*), COUNT(*) FILTER (WHERE tenant = ?) FROM documents", (tenant,)
        ).fetchone()
        if own >= self._limits.max_tenant_documents or everybody >= self._limits.max_documents:
            is_own = own >= self._limits.max_tenant_documents
            raise RequestError(
                f"there are {own if is_own else everybody} documents already: delete some first",
                code="too_many_documents",
                status=429,
            )


def _columns(document: Document) -> tuple[object, ...]:
    """What is looked for, beside the whole."""
    return (
        document.status,
        document.priority,
        document.deadline,
        document.pin.mode,
        document.pin.expires_at,
        document.num_tokens,
        document.first_hash,
        _ENCODER.encode(document),
    )


def _find(connection: sqlite3.Connection, document_id: str) -> Document | None:
    row = connection.execute(
        "SELECT body FROM documents WHERE document_id = ?", (document_id,)
    ).fetchone()
    return None if row is None else _DECODER.decode(row[0])


def _number(connection: sqlite3.Connection, tenant: str, document_id: str) -> int:
    row = connection.execute(
        "SELECT number FROM documents WHERE document_id = ? AND tenant = ?", (document_id, tenant)
    ).fetchone()
    if row is None:
        raise not_found("after")
    number: int = row[0]
    return number


def _pinned(connection: sqlite3.Connection, document: Document) -> Pinned:
    """What other documents have pinned; ended ones hold nothing."""
    ended = f"'{State.FAILED.value}', '{State.CANCELLED.value}', '{State.EXPIRED.value}'"
    everybody, hard = connection.execute(
        "SELECT COALESCE(SUM(num_tokens), 0), COALESCE(SUM(num_tokens)"
        " FILTER (WHERE pin_mode = ? AND tenant = ?), 0) FROM documents"
        f" WHERE pin_mode != ? AND status NOT IN ({ended}) AND document_id != ?",
        (HARD, document.tenant, NO_PIN, document.document_id),
    ).fetchone()
    return Pinned(everybody, hard)


def not_found(param: str | None = None) -> RequestError:
    """Of an id that is unknown, malformed or another tenant's: nobody learns which."""
    return RequestError("no such document", code="document_not_found", param=param, status=404)
