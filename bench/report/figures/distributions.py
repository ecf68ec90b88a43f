"""Plots of how latencies are distributed, and of the first token against the prompt's length."""

import math
from collections.abc import Callable, Sequence

from bench.load.analysis.intervals import min_samples, percentile
from bench.load.analysis.metrics import e2e_of, itls_of, ttft_of
from bench.load.analysis.slo import tpot_of
from bench.load.record import RequestRecord
from bench.report.drawing.plot import NEUTRAL, Axis, Dashes, Dot, Dots, Layer, Line, Plot
from bench.report.drawing.scale import LOG_FLOOR, seconds
from bench.report.runs import Side

MAX_POINTS = 160  # of a curve
MAX_DOTS = 900  # of a scatter plot, over all targets
STYLES: tuple[Dashes, ...] = ("", "dash", "dot")
MARKED = (0.5, 0.9, 0.99)


def _one(value: float | None) -> list[float]:
    return [] if value is None else [value]


METRICS: dict[str, tuple[str, str, Callable[[RequestRecord], list[float]]]] = {
    "ttft": ("TTFT", "time to first token", lambda record: _one(ttft_of(record))),
    "itl": ("ITL", "time between tokens", lambda record: list(itls_of(record))),
    "tpot": ("TPOT", "time per output token", lambda record: _one(tpot_of(record))),
    "e2e": ("E2E", "time to the last token", lambda record: _one(e2e_of(record))),
}


def distributions(sides: Sequence[Side]) -> list[Plot]:
    """A CDF and a tail for each latency.

    A request that failed before its first token has no TTFT, and one that failed has no E2E: they
    rank above every value, so that a curve ends at the share that was answered.
    """
    plots: list[Plot] = []
    for key in METRICS:
        found = [(side, _ranked(side, key)) for side in sides]
        if any(ordered for _, ordered in found):
            plots += [_cdf(key, found), _tail(key, found)]
    return plots


def _ranked(side: Side, key: str) -> list[float]:
    name, _, read = METRICS[key]
    records = side.records if key in ("ttft", "itl") else side.answered
    values = sorted(at for record in records for at in read(record))
    summary = side.summary.metrics.get(f"{name.lower()}_s")
    return values + [math.inf] * (summary.num_failed if summary is not None else 0)


def _cdf(key: str, found: Sequence[tuple[Side, list[float]]]) -> Plot:
    short, words, _ = METRICS[key]
    layers: list[Layer] = []
    for side, ordered in found:
        values = [(percentile(ordered, share), share) for share in _shares(len(ordered))]
        points = tuple((at, share) for at, share in values if math.isfinite(at))
        layers.append(Line(side.name, side.color, points))
        layers.append(Dots("", side.color, _marks(side, ordered, tail=False)))
    return Plot(
        f"{key}-cdf",
        f"{short}: {words}",
        Axis(f"{words}, from the intended time" if key in ("ttft", "e2e") else words, "s", low=0.0),
        Axis("share at most as long", "share", low=0.0, high=1.0),
        tuple(layers),
        "Up to p99. Marked: p50, p90 and, where there are enough, p99. A curve that ends lower "
        "than p99 is of a target that failed the rest.",
        tab=short,
    )


def _tail(key: str, found: Sequence[tuple[Side, list[float]]]) -> Plot:
    short, words, _ = METRICS[key]
    layers: list[Layer] = []
    floor = 1.0
    for side, ordered in found:
        num = len(ordered)
        ranks = [rank for rank in _tail_ranks(num) if math.isfinite(ordered[rank])]
        points = tuple((max(ordered[rank], LOG_FLOOR), (num - rank) / num) for rank in ranks)
        floor = min([floor, *(share for _, share in points)])
        layers.append(Line(side.name, side.color, points))
        layers.append(Dots("", side.color, _marks(side, ordered, tail=True)))
    return Plot(
        f"{key}-tail",
        f"{short}: the tail",
        Axis(words, "s", log=True),
        Axis("share at least as long", "share", log=True, low=0.8 * floor, high=1.0),
        tuple(layers),
        "Both axes are logarithmic: each decade down is ten times rarer. A curve that ends high up "
        "is of a target that failed the rest.",
        tab=f"{short} tail",
    )


def _shares(num: int) -> list[float]:
    count = min(num, MAX_POINTS)
    return [0.99 * (index + 1) / count for index in range(count)] if count else []


def _tail_ranks(num: int) -> list[int]:
    """Ranks from 0, ever denser towards the largest value."""
    ranks = {0, num - 1}
    remaining = float(num)
    while remaining >= 1.0:
        ranks.add(num - int(remaining))
        remaining *= 0.94
    return sorted(rank for rank in ranks if 0 <= rank < num)


def _marks(side: Side, ordered: Sequence[float], *, tail: bool) -> tuple[Dot, ...]:
    marks: list[Dot] = []
    for share in MARKED:
        if len(ordered) < min_samples(share) or math.isinf(at := percentile(ordered, share)):
            continue
        tip = f"{side.name}: p{100 * share:g} = {seconds(at)}, n = {len(ordered)}"
        marks.append(Dot(max(at, LOG_FLOOR), 1 - share if tail else share, tip))
    return tuple(marks)


def first_token_by_length(sides: Sequence[Side]) -> list[Plot]:
    """TTFT of each request against its prompt's length, with the deadline, one plot per target."""
    share = MAX_DOTS // max(1, len(sides))
    limits = [
        at
        for side in sides
        for record in side.answered
        if (at := ttft_of(record)) is not None and at > 0
    ]
    low, high = min(limits, default=1e-3), max(limits, default=1.0)
    return [_by_length(side, share, (low * 0.8, high * 1.25)) for side in sides]


def _by_length(side: Side, max_dots: int, limits: tuple[float, float]) -> Plot:
    answered = [
        record
        for record in side.answered
        if record.num_prompt_tokens > 0 and (ttft_of(record) or 0.0) > 0.0
    ]
    shown = _thinned(answered, max_dots)
    knows_cache = any(record.num_cached_tokens is not None for record in answered)
    dots = tuple(_dot(record, _deadline_s(side, record)) for record in shown)
    layers: list[Layer] = [Dots("requests", side.color, dots)]
    num_unseen = 0
    if side.slo is not None and answered:
        lengths = sorted({record.num_prompt_tokens for record in answered})
        kinds = {record.kind for record in answered}
        curves = _deadlines(side, sorted(kinds), (lengths[0], lengths[-1]))
        seen = [below for curve in curves if (below := _below(curve, limits[1])).points]
        layers += seen
        num_unseen = len(curves) - len(seen)
    left_out = len(answered) - len(shown)
    note = "From the intended time; both axes are logarithmic. Hollow dots missed their deadline."
    if num_unseen:
        which = "The deadline lies" if num_unseen == 1 else f"{num_unseen} deadlines lie"
        note += f" {which} above the drawing, far from every request."
    if left_out:
        note += f" {left_out} of {len(answered)} requests are left out of the drawing, evenly."
    return Plot(
        f"ttft-length-{side.color}",
        f"TTFT against prompt length: {side.name}",
        Axis("prompt tokens", "tokens", log=True),
        Axis("time to first token", "s", log=True, low=limits[0], high=limits[1]),
        tuple(layers),
        note,
        tab=side.name,
        ramp="share of the prompt cached" if knows_cache else "",
    )


def _dot(record: RequestRecord, deadline_s: float | None) -> Dot:
    at = ttft_of(record)
    assert at is not None
    share = None
    cached = "cache not told"
    if record.num_cached_tokens is not None:
        share = min(1.0, record.num_cached_tokens / record.num_prompt_tokens)
        cached = f"{share:.0%} cached"
    tip = (
        f"request {record.index}, {record.kind}: {record.num_prompt_tokens:,} tokens, "
        f"{cached}, TTFT {seconds(at)}"
    )
    is_late = deadline_s is not None and at > deadline_s
    return Dot(record.num_prompt_tokens, at, tip, share, hollow=is_late)


def _deadline_s(side: Side, record: RequestRecord) -> float | None:
    deadline = None if side.slo is None else side.slo.of(record.kind).ttft
    return None if deadline is None else deadline.at(record.num_prompt_tokens)


def _thinned(records: Sequence[RequestRecord], limit: int) -> list[RequestRecord]:
    """Every so-manieth by rising TTFT, the slowest always."""
    ordered = sorted(records, key=lambda record: ttft_of(record) or 0.0)
    if len(ordered) <= limit:
        return ordered
    step = len(ordered) / limit
    kept = {int(index * step) for index in range(limit)} | {len(ordered) - 1}
    return [ordered[index] for index in sorted(kept)]


def _deadlines(side: Side, kinds: Sequence[str], ends: tuple[int, int]) -> list[Line]:
    """The deadline's curve, one per distinct objective."""
    assert side.slo is not None
    found: dict[tuple[float, ...], list[str]] = {}
    low, high = ends
    lengths = [low * (max(high, low + 1) / low) ** (index / 40) for index in range(41)]
    for kind in kinds:
        deadline = side.slo.of(kind).ttft
        if deadline is not None:
            curve = tuple(deadline.at(int(length)) for length in lengths)
            found.setdefault(curve, []).append(kind)
    curves: list[Line] = []
    for number, (curve, of) in enumerate(found.items()):
        name = "deadline" if len(found) == 1 else f"deadline, {', '.join(of)}"
        points = tuple(zip(lengths, curve, strict=True))
        curves.append(Line(name, NEUTRAL, points, STYLES[number % len(STYLES)]))
    return curves


def _below(line: Line, limit: float) -> Line:
    """The part of a deadline that the drawing has room for: requests say how much that is."""
    points = tuple(point for point in line.points if point[1] <= limit)
    return Line(line.name, line.color, points, line.dashes)
