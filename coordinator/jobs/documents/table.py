"""The documents in the database. Every change is one transaction: a new value, and its events.

Whoever changes a document says how its next value follows from the present one; that is worked out
inside the transaction, so two changes never build on the same value, and a step that another one
has made impossible raises ``IllegalTransition`` and changes nothing.
"""

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from coordinator.config import JobLimits
from coordinator.jobs.database import Database
from coordinator.jobs.documents import events
from coordinator.jobs.documents import rows as rows
from coordinator.jobs.documents.document import NO_PIN, Change, Document, state_event
from coordinator.jobs.documents.pins import Pinned
from coordinator.jobs.documents.states import PENDING, DocumentState
from coordinator.jobs.quotas import NO_QUOTA, Quota
from coordinator.requests.admission import Departures, Queue
from protocol.errors import RequestError

T = TypeVar("T")


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
        quota: of each tenant.
    """

    def __init__(
        self,
        database: Database,
        limits: JobLimits,
        clock: Callable[[], float],
        quota: Quota = NO_QUOTA,
    ) -> None:
        self.changes = events.ChangeNotifier()
        self._database = database
        self._epoch = 0  # before ``claim``
        self.refusal = RequestError("the server is starting", code="starting", status=503)
        self._limits = limits
        self.clock = clock
        self.quota = quota
        self._departures = Departures()
        self._queue = Queue()

    async def claim(self) -> None:
        """Be the one process that writes, from now on: an older one that is still there is not."""
        self._epoch = await self._database.write(rows.claim, "owner_claimed")

    async def _write(self, work: Callable[[sqlite3.Connection], T], kind: str) -> T:
        if not self._epoch:
            raise self.refusal

        def transaction(connection: sqlite3.Connection) -> T:
            rows.check_owner(connection, self._epoch)
            return work(connection)

        return await self._database.write(transaction, kind)

    # -- changing ----------------------------------------------------------------------------------

    async def insert(
        self,
        document: Document,
        idempotency: Idempotency | None,
        check_pin: Callable[[Pinned], None],
        num_bytes: int = 0,
    ) -> tuple[Document, bool]:
        """Keep a new document; or find the one that an earlier request with the same key has made.

        Returns:
            It, and whether it is new.

        Raises:
            RequestError: ``idempotency_conflict``, ``too_many_documents``, ``too_many_waiting``,
                ``quota_exceeded``, or what ``check_pin`` raises.
        """

        def work(connection: sqlite3.Connection) -> tuple[Document, bool]:
            if idempotency is not None:
                known = self._known(connection, document.tenant, idempotency)
                if known is not None:
                    return known, False
            self._check_number(connection, document.tenant)
            self._check_waiting(connection, document.tenant)
            self.quota.check(connection, document.tenant, num_bytes)
            check_pin(rows.pinned(connection, document))
            connection.execute(
                "INSERT INTO documents (document_id, tenant, status, priority, deadline, pin_mode,"
                " pin_expires_at, num_tokens, first_hash, body) VALUES (?,?,?,?,?,?,?,?,?,?)",
                (document.document_id, document.tenant, *rows.columns(document)),
            )
            connection.execute(
                "INSERT INTO document_sizes VALUES (?, ?, ?)",
                (document.document_id, document.tenant, num_bytes),
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

        return await self._write(work, "document_added")

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
            document = rows.find(connection, document_id)
            if document is None:
                raise rows.not_found()
            change = work(document)
            if check_pin is not None:
                check_pin(change.document, rows.pinned(connection, change.document))
            is_kept = change.document.state is DocumentState.PREFILLING
            if is_kept and document.state is DocumentState.TOKENIZING:
                num_tokens = change.document.num_tokens
                self.quota.check(connection, document.tenant, num_tokens=num_tokens)
            if change.document != document:
                connection.execute(
                    "UPDATE documents SET status = ?, priority = ?, deadline = ?, pin_mode = ?,"
                    " pin_expires_at = ?, num_tokens = ?, first_hash = ?, body = ?"
                    " WHERE document_id = ?",
                    (*rows.columns(change.document), document_id),
                )
            self._tell(connection, change)
            return change.document

        following = await self._write(transaction, "document_changed")
        if following.state not in PENDING:
            self._departures.ended(self.clock())
        self.changes.notify(document_id)
        return following

    async def delete(self, document_id: str) -> Document:
        """Drop a document; that its KV and files are to be removed is remembered until they are.

        Raises:
            RequestError: there is no such document.
        """

        def work(connection: sqlite3.Connection) -> Document:
            document = rows.find(connection, document_id)
            if document is None:
                raise rows.not_found()
            connection.execute(
                "INSERT INTO deleted_documents VALUES (?, ?)",
                (document_id, rows.encode(document)),
            )
            connection.execute("DELETE FROM documents WHERE document_id = ?", (document_id,))
            return document

        document = await self._write(work, "document_deleted")
        self.changes.notify(document_id)
        return document

    async def finish_deletion(self, document_id: str) -> None:
        """Nothing is left of a deleted document."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(
                "DELETE FROM deleted_documents WHERE document_id = ?", (document_id,)
            )

        await self._write(work, "deletion_finished")

    # -- looking -----------------------------------------------------------------------------------

    async def find(self, document_id: str) -> Document | None:
        return await self._database.read(lambda connection: rows.find(connection, document_id))

    async def page(
        self, tenant: str, after: str | None, limit: int, *, is_ascending: bool
    ) -> tuple[list[Document], bool]:
        """A tenant's documents in the order of their making, and whether there are more.

        Raises:
            RequestError: ``after`` is no document of the tenant's.
        """

        def work(connection: sqlite3.Connection) -> tuple[list[Document], bool]:
            comparison, order = (">", "ASC") if is_ascending else ("<", "DESC")
            where = ""
            if after is not None:
                where = f" AND number {comparison} {rows.number(connection, tenant, after)}"
            found = connection.execute(
                f"SELECT body FROM documents WHERE tenant = ?{where}"
                f" ORDER BY number {order} LIMIT ?",
                (tenant, limit + 1),
            ).fetchall()
            return rows.decoded(found[:limit]), len(found) > limit

        return await self._database.read(work)

    async def with_states(
        self, states: frozenset[DocumentState], *, limit: int = -1, after: str = ""
    ) -> list[Document]:
        """Documents of any tenant, in the order in which they are to be worked on.

        Args:
            states: any of them.
            limit: no more than these.
            after: the ids above this one, in the order of ids: for going through them in turns.
        """
        order = "document_id" if after else "priority DESC, number"

        def work(connection: sqlite3.Connection) -> list[Document]:
            found = connection.execute(
                "SELECT body FROM documents"
                f" WHERE status IN ({rows.named(states)}) AND document_id > ?"
                f" ORDER BY {order} LIMIT ?",
                (after, limit),
            )
            return rows.decoded(found)

        return await self._database.read(work)

    async def queued(self, limit: int) -> list[Document]:
        """Documents that wait, so many of each tenant: first the first of each, then the second.

        Of one tenant's the one with the highest priority comes first, then the oldest.
        """

        def work(connection: sqlite3.Connection) -> list[Document]:
            found = connection.execute(
                "SELECT body FROM (SELECT body, number, ROW_NUMBER() OVER"
                " (PARTITION BY tenant ORDER BY priority DESC, number) AS place"
                " FROM documents WHERE status = ?) WHERE place <= ? ORDER BY place, number",
                (DocumentState.QUEUED.value, limit),
            )
            return rows.decoded(found)

        return await self._database.read(work)

    async def due(self, now: float) -> list[Document]:
        """Documents whose pin or whose deadline is over."""

        def work(connection: sqlite3.Connection) -> list[Document]:
            found = connection.execute(
                f"SELECT body FROM documents WHERE (pin_expires_at > 0 AND pin_expires_at <= ?)"
                f" OR (status IN ({rows.named(PENDING)}) AND deadline <= ?)",
                (now, now),
            )
            return rows.decoded(found)

        return await self._database.read(work)

    async def pinned_documents(self) -> list[Document]:
        """Documents with a pin, of any tenant."""
        return await self._select("pin_mode != ?", NO_PIN)

    async def sharing(self, first_hash: str) -> list[Document]:
        """Documents that begin with the same block."""
        return await self._select("first_hash = ?", first_hash)

    async def _select(self, condition: str, value: str) -> list[Document]:
        def work(connection: sqlite3.Connection) -> list[Document]:
            found = connection.execute(f"SELECT body FROM documents WHERE {condition}", (value,))
            return rows.decoded(found)

        return await self._database.read(work)

    async def ids(self) -> set[str]:
        """Of all documents, deleted ones that are not put away yet included."""

        def work(connection: sqlite3.Connection) -> set[str]:
            found = connection.execute(
                "SELECT document_id FROM documents UNION SELECT document_id FROM deleted_documents"
            )
            return {document_id for (document_id,) in found}

        return await self._database.read(work)

    async def deletions(self) -> list[Document]:
        """Deleted documents whose KV and files are still to be removed."""

        def work(connection: sqlite3.Connection) -> list[Document]:
            found = connection.execute("SELECT body FROM deleted_documents")
            return rows.decoded(found)

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
        return rows.find(connection, document_id)

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

    def _check_waiting(self, connection: sqlite3.Connection, tenant: str) -> None:
        everybody, own = connection.execute(
            "SELECT COUNT(*), COUNT(*) FILTER (WHERE tenant = ?) FROM documents"
            f" WHERE status IN ({rows.named(PENDING)})",
            (tenant,),
        ).fetchone()
        is_own = own >= self._limits.max_tenant_waiting
        if not is_own and everybody < self._limits.max_waiting:
            return
        now = self.clock()
        raise RequestError(
            f"{own if is_own else everybody} documents wait to be made ready already",
            code="too_many_waiting",
            status=429 if is_own else 503,
            retry_after_s=self._queue.retry_after_s(1, self._departures.per_s(now), now),
        )
