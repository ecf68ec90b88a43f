"""Where a request's time went: the driver's clock joined with the server's time line.

The two clocks are never compared. The server's events are seconds from the request's arrival there;
they are laid so that the arrival is when the driver sent. What the driver saw and the server did
not (connections, the way back) is left over as "network and HTTP". A server without time lines
has two phases: until the first token, and after it.
"""

from dataclasses import dataclass
from typing import Any

from bench.load.record import RequestRecord

PHASES = (  # in the order of a request's life
    "client lag",
    "admission",
    "decode reservation",
    "prefill queue",
    "prefill compute",
    "queue and prefill",
    "hand-off",
    "network and HTTP",
    "KV transfer not hidden",
    "decode queue and step",
)
DECODE = "decode"
UNTIL_FIRST, AFTER_FIRST = "until the first token", "after the first token"


@dataclass(frozen=True, slots=True)
class Phase:
    """A piece of a request's life, in seconds from its intended time."""

    name: str
    start_s: float
    end_s: float
    pool: str = ""

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


def server_side(record: RequestRecord) -> dict[str, Any] | None:
    """The time line of the request's first sequence, or None where the server has not told one."""
    timeline = record.timeline
    if timeline is None:
        return None
    requests = timeline.get("requests", [timeline])
    first = requests[0] if isinstance(requests, list) and requests else None
    return first if isinstance(first, dict) and isinstance(first.get("events"), dict) else None


def phases_of(record: RequestRecord) -> list[Phase]:
    """The phases of a request that brought a token, in order and without gaps; else what there is.

    Their ends never decrease: an event that a clock puts before the one ahead of it has no length.
    """
    walk = _Walk()
    walk.to("client lag", max(0.0, record.sent_s - record.intended_s))
    told = server_side(record)
    if told is None:
        _client_only(walk, record)
        return walk.phases
    sent = walk.at
    events = told["events"]
    prefill_pool = str(told.get("prefill_pool") or told.get("decode_pool") or "")
    decode_pool = str(told.get("decode_pool") or "")
    walk.until("admission", sent, events.get("tokenized"))
    walk.until("decode reservation", sent, events.get("prefill_sent", events.get("reserved")))
    prefill = told.get("prefill") or {}
    queue_s, compute_s = prefill.get("queue_s"), prefill.get("compute_s")
    if queue_s is not None and compute_s is not None:
        walk.to("prefill queue", walk.at + queue_s, prefill_pool)
        walk.to("prefill compute", walk.at + compute_s, prefill_pool)
        walk.until("hand-off", sent, events.get("first_token"))
    else:
        walk.until("queue and prefill", sent, events.get("first_token"), prefill_pool)
    if record.token_times_s:
        walk.to("network and HTTP", record.token_times_s[0] - record.intended_s)
    walk.until("KV transfer not hidden", sent, events.get("committed"), decode_pool)
    walk.until("decode queue and step", sent, events.get("first_decode"), decode_pool)
    if record.finished_s is not None:
        walk.to(DECODE, record.finished_s - record.intended_s, decode_pool)
    return walk.phases


def _client_only(walk: "_Walk", record: RequestRecord) -> None:
    if record.token_times_s:
        walk.to(UNTIL_FIRST, record.token_times_s[0] - record.intended_s)
    if record.finished_s is not None:
        name = AFTER_FIRST if record.token_times_s else UNTIL_FIRST
        walk.to(name, record.finished_s - record.intended_s)


class _Walk:
    """Phases laid end to end."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self.at = 0.0

    def to(self, name: str, end_s: float, pool: str = "") -> None:
        """A phase until ``end_s``; one of no length is not noted."""
        if end_s > self.at:
            self.phases.append(Phase(name, self.at, end_s, pool))
            self.at = end_s

    def until(self, name: str, sent: float, event: float | None, pool: str = "") -> None:
        """A phase until an event of the server, if it happened."""
        if event is not None:
            self.to(name, sent + event, pool)
