"""The gate that all durable work goes through, so that none of it can end the coordinator for good.

1. ``recover`` judges what the lives before this one had in work when they died (suspects.py), once.
2. ``work`` marks a piece of work before it begins, and takes the mark off at its end (marks.py).
3. Work that one more death would condemn has the gate for itself; everything else waits meanwhile.
4. After too many deaths in a while nothing durable is begun until some of them are long ago.
5. What was set aside is refused by ``check`` until ``retry``.
"""

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import msgspec

from coordinator.jobs.engine import suspects
from coordinator.jobs.engine.database import Database
from coordinator.jobs.engine.marks import Life, Marks
from coordinator.jobs.engine.suspects import Name, Suspect, Work
from protocol.errors import RequestError

SET_ASIDE = "set_aside"
SUSPICION_S = 30 * 86_400.0  # after which a death is forgotten
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Budget:
    """Deaths that durable work may cost."""

    max_deaths: int = 2  # on board of which the same work was, before it is set aside
    most_in_window: int = 0  # deaths of any work, after which all of it waits; 0: any number
    window_s: float = 600.0


class Gate:
    """See the module's docstring. For one event loop.

    Args:
        database: with the tables of schema.py.
        marks: of this life.
        budget: how many deaths are too many.
        clock: Unix time.
    """

    def __init__(
        self,
        database: Database,
        marks: Marks,
        budget: Budget,
        clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._marks = marks
        self._budget = budget
        self._clock = clock
        self.num_deaths = 0  # of lives before this one, that had something in work
        self._known: dict[Name, Suspect] = {}
        self._recovered = asyncio.Event()
        self._held_until = 0.0
        self._change = asyncio.Condition()
        self._num_inside = 0
        self._is_alone = False
        self._num_waiting_alone = 0

    @property
    def num_set_aside(self) -> int:
        """Pieces of work that wait for somebody to ask for them again."""
        return sum(suspect.is_set_aside for suspect in self._known.values())

    @property
    def held_s(self) -> float:
        """Seconds until durable work is begun again; 0 when it is not held back."""
        return max(0.0, self._held_until - self._clock())

    # -- after a start -----------------------------------------------------------------------------

    async def recover(self) -> None:
        """Judge the lives before this one.

        Raises:
            RequestError: the disk is full: to be called again.
        """
        now = self._clock()
        for life in list(self._marks.earlier()):
            if life.on_board:
                await self._database.write(partial(self._judge, life, now), "judged")
            self._marks.forget(life)
        deaths, self._known = await self._database.write(partial(_remembered, now), "judged")
        self._held_until = suspects.held_until(
            deaths, self._budget.most_in_window, self._budget.window_s
        )
        if self.held_s:
            _log.error(
                "%d processes died with documents or batches in work: these wait for %.0f s",
                self._budget.most_in_window,
                self.held_s,
            )
        self._recovered.set()

    def set_aside(self, kind: str) -> list[str]:
        """Keys of a kind that are set aside."""
        return [n.key for n, s in self._known.items() if n.kind == kind and s.is_set_aside]

    def _judge(self, life: Life, now: float, connection: sqlite3.Connection) -> None:
        new = connection.execute("INSERT OR IGNORE INTO death VALUES (?, ?)", (life.name, now))
        if new.rowcount == 0:
            return  # judged already, by a process that died before it could forget it
        self.num_deaths += 1
        known = _suspects(connection)
        for one in suspects.after_death(life.on_board, known, now, self._budget.max_deaths):
            row = (*one.work.name, msgspec.json.encode(one))
            connection.execute("INSERT OR REPLACE INTO suspect VALUES (?, ?, ?)", row)
            _log.warning(
                "the server died while %s %s was in work, %d times by now%s",
                one.work.kind,
                one.work.key,
                one.num_deaths,
                ": it is set aside" if one.is_set_aside else "",
            )

    # -- working -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def work(self, work: Work) -> AsyncIterator[None]:
        """Do a piece of work; it waits its turn first. Nothing in it may wait for the gate.

        Raises:
            RequestError: ``set_aside``.
        """
        await self._recovered.wait()
        self.check(work.name)
        while held_s := self.held_s:  # noqa: ASYNC110 - it is the time that is waited for
            await asyncio.sleep(held_s)
        is_alone = suspects.is_doubtful(self._known.get(work.name), self._budget.max_deaths)
        async with self._inside(is_alone):
            mark = self._marks.put(work)
            try:
                yield
            finally:
                self._marks.take(mark)
        await self._clear(work)  # not of what was cancelled, or has failed

    @asynccontextmanager
    async def _inside(self, is_alone: bool) -> AsyncIterator[None]:
        """Be let in: together with others, or alone. Whoever waits to be alone goes first."""
        async with self._change:
            self._num_waiting_alone += is_alone
            try:
                if is_alone:
                    await self._change.wait_for(lambda: self._num_inside == 0)
                else:
                    await self._change.wait_for(
                        lambda: not self._is_alone and self._num_waiting_alone == 0
                    )
                self._num_inside, self._is_alone = self._num_inside + 1, is_alone
            finally:
                self._num_waiting_alone -= is_alone
                self._change.notify_all()
        try:
            yield
        finally:
            await asyncio.shield(self._leave())

    def check(self, name: Name) -> None:
        """Refuse what is set aside.

        Raises:
            RequestError: ``set_aside``, with how often and when.
        """
        suspect = self._known.get(name)
        if suspect is not None and suspect.is_set_aside:
            raise refusal(suspect)

    def verdict(self, name: Name) -> Suspect | None:
        """What is known of it, if it was on board of deaths."""
        return self._known.get(name)

    async def retry(self, name: Name) -> None:
        """Somebody asks for it again: its deaths are forgotten.

        Raises:
            RequestError: the disk is full.
        """
        if name in self._known:
            await self._database.write(lambda c: _remove(c, name), "judged")
            self._known.pop(name, None)

    async def _leave(self) -> None:
        async with self._change:
            self._num_inside -= 1
            self._is_alone = False
            self._change.notify_all()

    async def _clear(self, work: Work) -> None:
        suspect = self._known.get(work.name)
        if suspect is None or not suspects.is_cleared(suspect, work):
            return
        try:
            await self._database.write(lambda c: _remove(c, work.name), "judged")
        except RequestError as error:  # a full disk: it is cleared by the next that it does
            _log.warning("%s %s is still under suspicion: %s", work.kind, work.key, error)
            return
        self._known.pop(work.name, None)

    def close(self) -> None:
        """An orderly end: nothing that was in work is to blame for it. Idempotent."""
        self._marks.close()


def refusal(suspect: Suspect) -> RequestError:
    """Says why something is set aside."""
    return RequestError(
        f"the server has died {suspect.num_deaths} times while it worked on this, at Unix time "
        f"{suspect.first_at:.0f} first and at {suspect.last_at:.0f} last: it is set aside until "
        f"somebody asks for it again",
        code=SET_ASIDE,
        status=500,
    )


def _remove(connection: sqlite3.Connection, name: Name) -> None:
    connection.execute("DELETE FROM suspect WHERE kind = ? AND key = ?", name)


def _suspects(connection: sqlite3.Connection) -> dict[Name, Suspect]:
    rows = connection.execute("SELECT body FROM suspect")
    found = [msgspec.json.decode(body, type=Suspect) for (body,) in rows]
    return {suspect.work.name: suspect for suspect in found}


def _remembered(
    now: float, connection: sqlite3.Connection
) -> tuple[list[float], dict[Name, Suspect]]:
    """When processes died with durable work, and the suspects; what is long ago is forgotten."""
    before = now - SUSPICION_S
    connection.execute("DELETE FROM death WHERE at < ?", (before,))
    known = _suspects(connection)
    for name in [n for n, s in known.items() if s.last_at < before and not s.is_set_aside]:
        _remove(connection, name)
        del known[name]
    return [at for (at,) in connection.execute("SELECT at FROM death ORDER BY at")], known
