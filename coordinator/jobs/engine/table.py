"""The jobs of one kind in the database, and the log of their events.

Every change is one transaction: a job's next value, and the events that tell of it. Whoever changes
a job says how its next value follows from the present one; that is worked out inside the
transaction, so two changes never build on the same value, and an event that another change has made
impossible raises ``IllegalTransition`` and changes nothing. Events outlive connections and
restarts; the oldest of a job are dropped when there are too many.
"""

import logging
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic

import msgspec

from coordinator.config import JobLimits
from coordinator.jobs.engine.database import Database
from coordinator.jobs.engine.job import J, Job, Notice
from coordinator.jobs.engine.notifier import ChangeNotifier
from coordinator.requests.admission import Departures, Queue
from protocol.errors import RequestError

Connection = sqlite3.Connection
_ENCODER = msgspec.json.Encoder()
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A caller's promise that requests with this key are one; the digest is of what it asks."""

    key: str
    digest: bytes


@dataclass(frozen=True, slots=True)
class WrittenEvent:
    """An event with its number: 1 is a job's first."""

    sequence: int
    at: float  # Unix time
    kind: str
    data: dict[str, Any]


class JobTable(Generic[J]):
    """All jobs of one kind.

    Args:
        database: with the tables of schema.py.
        of: the struct of these jobs.
        clock: Unix time.
        limits: how many events of one job are kept, the newest, and how long idempotency keys.
    """

    def __init__(
        self, database: Database, of: type[J], clock: Callable[[], float], limits: JobLimits
    ) -> None:
        self.of = of
        self.clock = clock
        self.changes = ChangeNotifier()
        self._database = database
        self._limits = limits
        self._decoder = msgspec.json.Decoder(of)
        self._departures = Departures()
        self._queue = Queue()

    # -- changing ----------------------------------------------------------------------------------

    async def insert(
        self,
        job: J,
        check: Callable[[Connection], None],
        idempotency: Idempotency | None = None,
    ) -> tuple[J, bool]:
        """Keep a new job, or find the one that an earlier request with the same key has made.

        Args:
            job: the new one.
            check: raises, inside the transaction, if there is no room for it.
            idempotency: the caller's, if it gave a key.

        Returns:
            The job, and whether it is new.

        Raises:
            RequestError: ``idempotency_conflict``, or what ``check`` raises.
        """

        def work(connection: Connection) -> tuple[J, bool]:
            now = self.clock()
            if idempotency is not None:
                before = (now - self._limits.idempotency_s,)
                connection.execute("DELETE FROM idempotency_key WHERE created_at < ?", before)
                known = self._known(connection, job.tenant, idempotency)
                if known is not None:
                    return known, False
            check(connection)
            insert_row(connection, job)
            if idempotency is not None:
                connection.execute(
                    "INSERT INTO idempotency_key VALUES (?, ?, ?, ?, ?)",
                    (job.tenant, idempotency.key, idempotency.digest, job.id, now),
                )
            self._log(connection, job.id, [job.state_notice()])
            return job, True

        return await self._database.write(work, f"{self.of.KIND}_added")

    async def change(
        self,
        job_id: str,
        work: Callable[[J], J | None],
        *notices: Notice,
        also: Callable[[Connection, J], None] | None = None,
        name: str = "changed",
    ) -> J:
        """Replace a job by what ``work`` makes of it.

        Args:
            job_id: which.
            work: pure: the next value of the present one; None leaves it, and writes nothing.
            notices: events that tell of the change. That of a new state needs not be given.
            also: done in the same transaction, with the next value. What it raises undoes it.
            name: of the change, for failpoints.

        Returns:
            The job as it is now.

        Raises:
            RequestError: there is no such job, or what ``also`` raises.
            IllegalTransition: from ``work``; nothing is changed.
        """

        def transaction(connection: Connection) -> tuple[J, J]:
            before = self.found(connection, job_id)
            after = work(before)
            if after is None:
                return before, before
            if also is not None:
                also(connection, after)
            return before, self.keep(connection, before, after, notices)

        before, after = await self._database.write(transaction, f"{self.of.KIND}_{name}")
        if before.is_pending and not after.is_pending:
            self._departures.ended(self.clock())
        self.changes.notify(job_id)
        return after

    async def delete(self, job_id: str) -> None:
        """Drop a job; that what it has used is to be put away is remembered until it is.

        Raises:
            RequestError: there is no such job.
        """

        def work(connection: Connection) -> None:
            insert_cleanup(connection, self.found(connection, job_id))
            connection.execute("DELETE FROM job WHERE job_id = ?", (job_id,))

        await self._database.write(work, f"{self.of.KIND}_deleted")
        self.changes.notify(job_id)

    async def cleaned_up(self, job_id: str) -> None:
        """Nothing is left of what a deleted or ended job has used."""
        query = "DELETE FROM cleanup WHERE job_id = ?"
        await self._database.write(lambda c: c.execute(query, (job_id,)), "cleaned_up")

    # -- looking -----------------------------------------------------------------------------------

    async def get(self, tenant: str, job_id: str) -> J:
        """A job of the tenant's.

        Raises:
            RequestError: 404: unknown, malformed, or another tenant's.
        """
        job = await self._database.read(lambda connection: self.found(connection, job_id))
        if job.tenant != tenant:
            raise self.not_found()
        return job

    async def page(
        self, tenant: str, after: str | None, limit: int, *, is_ascending: bool = False
    ) -> tuple[list[J], bool]:
        """A tenant's jobs in the order of their making, and whether there are more.

        Raises:
            RequestError: ``after`` is no job of the tenant's.
        """
        compares, order = (">", "ASC") if is_ascending else ("<", "DESC")
        where, values = "tenant = ?", [tenant]
        if after is not None:
            if not await self.select("tenant = ? AND job_id = ?", tenant, after):
                raise self.not_found("after")
            where += f" AND number {compares} (SELECT number FROM job WHERE job_id = ?)"
            values.append(after)
        found = await self.select(f"{where} ORDER BY number {order} LIMIT {limit + 1}", *values)
        return found[:limit], len(found) > limit

    async def select(self, where: str, *values: object) -> list[J]:
        """The jobs of any tenant that a condition of SQL holds for."""
        return await self._jobs(f"job WHERE kind = ? AND {where}", *values)

    async def in_states(
        self, states: Iterable[Enum], *, after: str = "", limit: int = -1
    ) -> list[J]:
        """Jobs of any tenant in the order of their ids: those above ``after``, up to ``limit``."""
        where = f"state IN ({_named(states)}) AND job_id > ? ORDER BY job_id LIMIT ?"
        return await self.select(where, after, limit)

    async def waiting(self, limit: int) -> list[J]:
        """Jobs that can be begun, so many of each tenant: first the first of each, then the second.

        Of one tenant's the one with the highest priority comes first, then the oldest.
        """
        states = _named(self.of.PENDING - self.of.BEGUN)
        return await self._jobs(
            "(SELECT body, number, ROW_NUMBER() OVER (PARTITION BY tenant ORDER BY priority DESC,"
            f" number) AS place FROM job WHERE kind = ? AND state IN ({states}))"
            " WHERE place <= ? ORDER BY place, number",
            limit,
        )

    async def cleanups(self) -> list[J]:
        """Deleted and ended jobs that have left something to be put away."""
        return await self._jobs("cleanup WHERE kind = ?")

    async def ids(self) -> set[str]:
        """Of all jobs, with those that were deleted and have left something."""
        query = "SELECT job_id FROM job UNION SELECT job_id FROM cleanup"
        rows = await self._database.read(lambda c: c.execute(query).fetchall())
        return {job_id for (job_id,) in rows}

    async def events(self, job_id: str, after: int, limit: int = 100) -> list[WrittenEvent]:
        """A job's events after a number, in order."""
        query = (
            "SELECT sequence, at, kind, data FROM event"
            " WHERE job_id = ? AND sequence > ? ORDER BY sequence LIMIT ?"
        )
        values = (job_id, after, limit)
        rows = await self._database.read(lambda c: c.execute(query, values).fetchall())
        return [WrittenEvent(n, at, kind, msgspec.json.decode(data)) for n, at, kind, data in rows]

    async def _jobs(self, source: str, *values: object) -> list[J]:
        query, values = f"SELECT body FROM {source}", (self.of.KIND, *values)
        jobs = []
        for (body,) in await self._database.read(lambda c: c.execute(query, values).fetchall()):
            try:
                jobs.append(self._decode(body))
            except RequestError as error:  # it does not keep the others from it
                _log.error("a %s is passed over: %s", self.of.KIND, error)
        return jobs

    def not_found(self, param: str | None = None) -> RequestError:
        """Of an id that is unknown, malformed or another tenant's: nobody learns which."""
        kind = self.of.KIND
        return RequestError(f"no such {kind}", code=f"{kind}_not_found", param=param, status=404)

    # -- inside of a transaction -------------------------------------------------------------------

    def found(self, connection: Connection, job_id: str) -> J:
        """The job with an id.

        Raises:
            RequestError: there is none, or its row is not what this version writes.
        """
        query = "SELECT body FROM job WHERE kind = ? AND job_id = ?"
        row = connection.execute(query, (self.of.KIND, job_id)).fetchone()
        if row is None:
            raise self.not_found()
        return self._decode(row[0])

    def keep(
        self, connection: Connection, before: J, after: J, notices: Sequence[Notice] = ()
    ) -> J:
        """Write a job's next value, with the events; the value as it was written."""
        if after.state is not before.state:
            times = {**after.times, after.state.value: self.clock()}
            after = msgspec.structs.replace(after, times=times)
            notices = (*notices, after.state_notice())
            if after.state in self.of.CLEANED:
                insert_cleanup(connection, after)
        if after != before:
            columns = _columns(after)
            names = ", ".join(f"{name} = ?" for name in columns)
            query = f"UPDATE job SET {names} WHERE job_id = ?"
            connection.execute(query, (*columns.values(), after.id))
        self._log(connection, after.id, notices)
        return after

    def count(self, connection: Connection, tenant: str, where: str = "TRUE") -> tuple[int, int]:
        """Jobs that a condition of SQL holds for: of all tenants, and of one."""
        everybody, own = connection.execute(
            "SELECT COUNT(*), COUNT(*) FILTER (WHERE tenant = ?) FROM job"
            f" WHERE kind = ? AND {where}",
            (tenant, self.of.KIND),
        ).fetchone()
        return everybody, own

    def check_pending(
        self, connection: Connection, tenant: str, most: tuple[int, int], code: str, message: str
    ) -> None:
        """Refuse one more job if too many wait already.

        Args:
            connection: of the transaction.
            tenant: whose job it is.
            most: of one tenant, and of all together.
            code: of the refusal.
            message: of the refusal; their number takes the place of ``{}``.

        Raises:
            RequestError: 429 if they are the tenant's own, else 503. It says how long it takes
                until there is room, at the rate at which jobs have ended lately.
        """
        everybody, own = self.count(connection, tenant, f"state IN ({_named(self.of.PENDING)})")
        is_own = own >= most[0]
        if is_own or everybody >= most[1]:
            now = self.clock()
            raise RequestError(
                message.format(own if is_own else everybody),
                code=code,
                status=429 if is_own else 503,
                retry_after_s=self._queue.retry_after_s(1, self._departures.per_s(now), now),
            )

    def _known(self, connection: Connection, tenant: str, idempotency: Idempotency) -> J | None:
        query = "SELECT request_digest, job_id FROM idempotency_key WHERE tenant = ? AND key = ?"
        row = connection.execute(query, (tenant, idempotency.key)).fetchone()
        if row is None:
            return None
        digest, job_id = row
        if digest != idempotency.digest:
            raise RequestError(
                "this idempotency key was used for another request: use a new one",
                code="idempotency_conflict",
                param="idempotency_key",
                status=409,
            )
        return self.found(connection, job_id)

    def _decode(self, body: bytes) -> J:
        try:
            return self._decoder.decode(body)
        except msgspec.DecodeError as error:
            kind = self.of.KIND
            raise RequestError(
                f"the record of this {kind} cannot be read: {error}",
                code=f"{kind}_damaged",
                status=500,
            ) from error

    def _log(self, connection: Connection, job_id: str, notices: Sequence[Notice]) -> None:
        if not notices:
            return
        query = "SELECT COALESCE(MAX(sequence), 0) FROM event WHERE job_id = ?"
        (last,) = connection.execute(query, (job_id,)).fetchone()
        now = self.clock()
        rows = [
            (job_id, number, now, notice.kind, msgspec.json.encode(notice.data))
            for number, notice in enumerate(notices, last + 1)
        ]
        connection.executemany("INSERT INTO event VALUES (?, ?, ?, ?, ?)", rows)
        dropped = (job_id, last + len(notices) - self._limits.max_events)
        connection.execute("DELETE FROM event WHERE job_id = ? AND sequence <= ?", dropped)


def insert_row(connection: Connection, job: Job) -> None:
    """Write a new job, inside of a transaction."""
    columns = {"job_id": job.id, "kind": job.KIND, "tenant": job.tenant, **_columns(job)}
    names, marks = ", ".join(columns), ", ".join("?" * len(columns))
    connection.execute(f"INSERT INTO job ({names}) VALUES ({marks})", tuple(columns.values()))


def insert_cleanup(connection: Connection, job: Job) -> None:
    """Write down that a job has left something to be put away, inside of a transaction."""
    row = (job.id, job.KIND, _ENCODER.encode(job))
    connection.execute("INSERT OR REPLACE INTO cleanup VALUES (?, ?, ?)", row)


def _columns(job: Job) -> dict[str, object]:
    return {**job.columns(), "body": _ENCODER.encode(job)}


def _named(states: Iterable[Enum]) -> str:
    """A list of states in SQL."""
    return ", ".join(sorted(f"'{state.value}'" for state in states))
