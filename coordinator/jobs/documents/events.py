"""What happened to each document, numbered, in the database: it outlives connections and restarts.

An event is written in the transaction of the change that it tells of. Who waits for one is woken
when that is committed. The oldest of a document are dropped when there are too many.
"""

import asyncio
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from coordinator.jobs.documents.document import DocumentNotice

SCHEMA = (
    """CREATE TABLE IF NOT EXISTS document_events (
        document_id TEXT NOT NULL REFERENCES documents (document_id) ON DELETE CASCADE,
        sequence INTEGER NOT NULL,
        at REAL NOT NULL,
        kind TEXT NOT NULL,
        data BLOB NOT NULL,
        PRIMARY KEY (document_id, sequence)
    ) WITHOUT ROWID""",
)


@dataclass(frozen=True, slots=True)
class WrittenEvent:
    """An event with its number: 1 is a document's first."""

    sequence: int
    at: float  # Unix time
    kind: str
    data: dict[str, Any]

    def describe(self, document_id: str) -> dict[str, Any]:
        return {
            "type": self.kind,
            "sequence_number": self.sequence,
            "document_id": document_id,
            "created_at": round(self.at, 3),
            **self.data,
        }


def append(
    connection: sqlite3.Connection,
    document_id: str,
    events: Sequence[DocumentNotice],
    now: float,
    max_events: int,
) -> None:
    """Number and write events, in the transaction that is open."""
    (last,) = connection.execute(
        "SELECT COALESCE(MAX(sequence), 0) FROM document_events WHERE document_id = ?",
        (document_id,),
    ).fetchone()
    rows = [
        (document_id, last + number, now, event.kind, msgspec.json.encode(event.data))
        for number, event in enumerate(events, 1)
    ]
    connection.executemany("INSERT INTO document_events VALUES (?, ?, ?, ?, ?)", rows)
    connection.execute(
        "DELETE FROM document_events WHERE document_id = ? AND sequence <= ?",
        (document_id, last + len(events) - max_events),
    )


def read(
    connection: sqlite3.Connection, document_id: str, starting_after: int, limit: int
) -> list[WrittenEvent]:
    """The events after a number, in order."""
    rows = connection.execute(
        "SELECT sequence, at, kind, data FROM document_events"
        " WHERE document_id = ? AND sequence > ? ORDER BY sequence LIMIT ?",
        (document_id, starting_after, limit),
    )
    return [WrittenEvent(n, at, kind, msgspec.json.decode(data)) for n, at, kind, data in rows]


class ChangeNotifier:
    """Wakes whoever waits for news of a document."""

    def __init__(self) -> None:
        self.is_closed = False
        self._waiting: dict[str, asyncio.Event] = {}

    @property
    def num_waiting(self) -> int:
        """Documents of which somebody waits for news."""
        return len(self._waiting)

    def ticket(self, document_id: str) -> asyncio.Event:
        """Set at the next news. Take it before looking, so that nothing falls in between."""
        return self._waiting.setdefault(document_id, asyncio.Event())

    def notify(self, document_id: str) -> None:
        waiting = self._waiting.pop(document_id, None)
        if waiting is not None:
            waiting.set()

    def close(self) -> None:
        """There will be no more news: wakes everybody."""
        self.is_closed = True
        for document_id in list(self._waiting):
            self.notify(document_id)
