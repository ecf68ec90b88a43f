"""Where a request's time went, and the plots of it.

The driver's clock is joined with the server's time line, and the two are never compared. The
server's events are seconds from the request's arrival there; they are laid so that the arrival is
when the driver sent. What the driver saw and the server did not (connections, the way back) is left
over as "network and HTTP". A server without time lines has two phases: until the first token, and
after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.load.analysis.metrics import ttft_of
from bench.load.record import RequestRecord
from bench.report.drawing.plot import (
    NEUTRAL,
    Axis,
    Lanes,
    LaneText,
    Layer,
    Line,
    Plot,
    Span,
    Spans,
)
from bench.report.drawing.scale import seconds
from bench.report.runs import Side

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
MAX_LANES = 40
TAIL_SHARE = 0.01
MIN_TAIL = 3  # requests: fewer say nothing about a tail
COLORS = {
    "client lag": 3,
    "admission": 4,
    "decode reservation": 9,
    "prefill queue": 1,
    "prefill compute": 0,
    "queue and prefill": 5,
    "hand-off": 6,
    "network and HTTP": 7,
    "KV transfer not hidden": 2,
    "decode queue and step": 8,
    DECODE: NEUTRAL,
    UNTIL_FIRST: 5,
    AFTER_FIRST: NEUTRAL,
}


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


# ---- plots -------------------------------------------------------------------------------------


def decomposition(sides: Sequence[Side]) -> Plot:
    """Mean phases up to the second token, of all answered requests and of the slowest."""
    names: list[str] = []
    texts: list[tuple[int, float, str]] = []
    found: dict[str, list[Span]] = {}
    groups: list[tuple[str, dict[str, float]]] = []
    for side in sides:
        for group, records in _groups(side):
            groups.append((f"{side.name}, {group}", _mean_phases(records)))
    for lane, (name, means) in enumerate(groups):
        names.append(name)
        at = 0.0
        for phase in (*PHASES, UNTIL_FIRST):
            took = means.get(phase, 0.0)
            if took > 0.0:
                tip = f"{name}: {phase} {seconds(took)}"
                found.setdefault(phase, []).append(Span(lane, at, at + took, tip))
                at += took
        texts.append((lane, at, seconds(at)))
    layers: list[Layer] = [
        Spans(phase, COLORS[phase], tuple(found[phase]))
        for phase in (*PHASES, UNTIL_FIRST)
        if phase in found
    ]
    return Plot(
        "phases",
        "Where the time to the second token goes",
        Axis("seconds from the intended time", "s", low=0.0),
        Lanes(tuple(names)),
        (*layers, LaneText(tuple(texts))),
        "Means over requests, so that the pieces add up. The tail is the slowest 1 % by TTFT, at "
        f"least {MIN_TAIL}. The second token is there because the transfer that the prefill did "
        "not hide delays it, and not the first.",
        table=_table(groups),
    )


def _groups(side: Side) -> list[tuple[str, list[RequestRecord]]]:
    answered = [record for record in side.answered if ttft_of(record) is not None]
    ordered = sorted(answered, key=lambda record: -(ttft_of(record) or 0.0))
    tail = ordered[: max(MIN_TAIL, round(TAIL_SHARE * len(ordered)))]
    groups = [(f"mean of {len(ordered)}", ordered), (f"tail, {len(tail)} slowest", tail)]
    return [(name, records) for name, records in groups if len(records) >= MIN_TAIL]


def _mean_phases(records: Sequence[RequestRecord]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for record in records:
        for phase in phases_of(record):
            sums[phase.name] = sums.get(phase.name, 0.0) + phase.duration_s
    return {name: total / len(records) for name, total in sums.items()}


def _table(groups: Sequence[tuple[str, dict[str, float]]]) -> tuple[tuple[str, ...], ...]:
    names = [n for n in (*PHASES, UNTIL_FIRST) if any(means.get(n) for _, means in groups)]
    rows = [("requests", *names)]
    for group, means in groups:
        rows.append((group, *(seconds(means.get(name, 0.0)) for name in names)))
    return tuple(rows) if groups else ()


def gantt(side: Side) -> Plot:
    """Requests around the slowest first token, one lane each, by intended time."""
    shown = _window(side.records)
    start = min((record.intended_s for record in shown), default=0.0)
    found: dict[str, list[Span]] = {}
    names: list[str] = []
    texts: list[tuple[int, float, str]] = []
    for lane, record in enumerate(shown):
        names.append(f"{record.index} {record.kind}")
        base = record.intended_s - start
        end = base
        for phase in phases_of(record):
            end = base + phase.end_s
            span = Span(lane, base + phase.start_s, end, _tip(record, phase))
            found.setdefault(phase.name, []).append(span)
        if record.outcome != "ok":
            texts.append((lane, end, record.error_code or record.outcome))
    order = (*PHASES, UNTIL_FIRST, DECODE, AFTER_FIRST)
    layers: list[Layer] = [
        Spans(name, COLORS[name], tuple(found[name])) for name in order if name in found
    ]
    return Plot(
        f"gantt-{side.color}",
        f"Requests around the slowest one: {side.name}",
        Axis(f"seconds after {seconds(start)} of the run", "s", low=0.0),
        Lanes(tuple(names)),
        (*layers, LaneText(tuple(texts))),
        f"{len(shown)} of {len(side.records)} requests. The server's events are laid from the "
        "moment of sending: the way there is counted as admission.",
        tab=side.name,
    )


def _tip(record: RequestRecord, phase: Phase) -> str:
    where = f" on {phase.pool}" if phase.pool else ""
    return (
        f"request {record.index}, {record.kind}, {record.num_prompt_tokens:,} tokens: "
        f"{phase.name}{where} {seconds(phase.duration_s)}"
    )


def _window(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    """Neighbours by intended time of the request with the latest first token."""
    ordered = sorted(records, key=lambda record: (record.intended_s, record.index))
    if len(ordered) <= MAX_LANES:
        return ordered
    slowest = max(range(len(ordered)), key=lambda index: ttft_of(ordered[index]) or 0.0)
    first = min(max(0, slowest - MAX_LANES // 2), len(ordered) - MAX_LANES)
    return ordered[first : first + MAX_LANES]


def pools(side: Side) -> Plot:
    """How many requests each pool holds at once, over the run."""
    changes: dict[str, list[tuple[float, int]]] = {}
    for record in side.records:
        held: dict[str, tuple[float, float]] = {}
        for phase in phases_of(record):
            if phase.pool:
                start_s, _ = held.setdefault(phase.pool, (phase.start_s, phase.end_s))
                held[phase.pool] = start_s, phase.end_s
        for pool, (start_s, end_s) in held.items():
            own = changes.setdefault(pool, [])
            own.append((record.intended_s + start_s, 1))
            own.append((record.intended_s + end_s, -1))
    end_s = max((at for steps in changes.values() for at, _ in steps), default=1.0)
    layers: list[Layer] = []
    for number, (pool, steps) in enumerate(sorted(changes.items())):
        layers.append(Line(pool, number, _counts(steps), steps=True))
    return Plot(
        f"pools-{side.color}",
        f"Requests in each pool: {side.name}",
        Axis("seconds of the run", "s", low=0.0, high=end_s),
        Axis("requests at once", low=0.0),
        tuple(layers),
        "Queued and computed ones, by the server's time lines.",
        tab=side.name,
    )


def _counts(
    steps: Sequence[tuple[float, int]], max_points: int = 500
) -> tuple[tuple[float, float], ...]:
    changes: dict[float, int] = {}
    for at, change in steps:
        changes[at] = changes.get(at, 0) + change
    held = 0
    points: list[tuple[float, float]] = []
    for at, change in sorted(changes.items()):
        if change:
            held += change
            points.append((at, float(held)))
    if len(points) <= max_points:
        return tuple(points)
    width = -(-2 * len(points) // max_points)
    kept: list[tuple[float, float]] = []
    for first in range(0, len(points), width):
        piece = points[first : first + width]
        peak = max(piece, key=lambda point: point[1])  # must not vanish with its neighbours
        kept += [peak] if peak == piece[-1] else [peak, piece[-1]]
    return tuple(kept)


def has_timelines(side: Side) -> bool:
    """Whether the server has told where its time went, of one request at least."""
    return any(server_side(record) is not None for record in side.records)
