"""One time line per request. Every latency that is reported is a difference of two of its entries.

All times are of the coordinator's monotonic clock, taken when it learns of the event: clocks of two
machines are never compared. Other processes report durations.
"""

import enum

import msgspec


class TimelineEvent(enum.StrEnum):
    """In the order of a request's life."""

    ARRIVED = "arrived"
    TOKENIZED = "tokenized"
    RESERVED = "reserved"  # the decode pool has granted blocks
    PREFILL_SENT = "prefill_sent"
    FIRST_TOKEN = "first_token"
    COMMITTED = "committed"  # every segment is read, confirmed and of the manifest
    FIRST_DECODE = "first_decode"  # the first token that the decode pool made
    RETRIED = "retried"  # an attempt was lost, and another begun
    FINISHED = "finished"
    RELEASED = "released"  # no pool holds a block of it any more


class TimeLine(msgspec.Struct):
    """The events of one request so far. Only its owner, the coordinator, writes it."""

    times: dict[TimelineEvent, float] = {}

    def mark(self, event: TimelineEvent, now: float) -> None:
        """Record the first time that ``event`` is seen; later ones change nothing."""
        self.times.setdefault(event, now)

    def between(self, start: TimelineEvent, end: TimelineEvent) -> float | None:
        """Seconds from ``start`` to ``end``, or None when one of them has not been seen."""
        if start not in self.times or end not in self.times:
            return None
        return self.times[end] - self.times[start]
