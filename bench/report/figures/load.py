"""Plots over the load: attainment against rate, throughput against interactivity, goodput."""

from collections.abc import Sequence

from bench.report.drawing.plot import (
    Axis,
    Band,
    Dashes,
    Lanes,
    LaneText,
    Layer,
    Line,
    Plot,
    Rule,
    Span,
    Spans,
    Whiskers,
)
from bench.report.drawing.scale import between, compact, seconds
from bench.report.figures.load_points import LoadPoint, load_points
from bench.report.runs import Side

PARTS: tuple[tuple[str, Dashes], ...] = (("TTFT", "dash"), ("TPOT", "dot"))
RATE_LABEL = "offered requests/s per accelerator"
Rows = list[tuple[str, ...]]


def attainment(sides: Sequence[Side]) -> Plot:
    """Share of all requests that met their objectives, against the offered rate."""
    layers: list[Layer] = []
    rows: Rows = [("target", "rate per accelerator", "joint", "interval", "TTFT only", "TPOT only")]
    judged = load_points([side for side in sides if side.slo is not None])
    if all(len(points) == 1 for points in judged.values()):
        return _attainment_bars([points[0] for points in judged.values()])
    for name, points in judged.items():
        color = points[0].color
        joint = [(point.rate_per_accelerator, point.share("joint")) for point in points]
        layers.append(Band(color, tuple((x, share.low, share.high) for x, share in joint)))
        line = tuple((x, share.share) for x, share in joint)
        tips = tuple(f"{name} at {compact(x)}/s per accelerator: {share}" for x, share in joint)
        layers.append(Line(f"{name}, joint", color, line, dots=True, tips=tips))
        for part, dashes in PARTS:
            alone = tuple((p.rate_per_accelerator, p.share(part).share) for p in points)
            layers.append(Line(f"{name}, {part} only", color, alone, dashes, dots=len(points) == 1))
        rows += [_attainment_row(point) for point in points]
    for target in sorted({point.target for points in judged.values() for point in points}):
        layers.append(Rule(target, f"target {100 * target:.4g} %"))
    return Plot(
        "attainment",
        "SLO attainment against rate",
        Axis(RATE_LABEL, "rate", low=0.0),
        Axis("share of requests within their objectives", "share", low=0.0, high=1.0),
        tuple(layers),
        "A failed request is a miss. The band is the 95 % interval of the joint share (Wilson, for "
        "the effective number of independent requests).",
        table=tuple(rows),
    )


def _attainment_bars(points: Sequence[LoadPoint]) -> Plot:
    """The same at one rate: there is nothing to see along an axis of rates."""
    names: list[str] = []
    bars: list[Spans] = []
    whiskers: list[tuple[int, float, float]] = []
    for point in points:
        spans = []
        for part, words in (("joint", "all"), ("TTFT", "TTFT only"), ("TPOT", "TPOT only")):
            share = point.share(part)
            lane = len(names)
            names.append(f"{point.name}, {words}")
            spans.append(Span(lane, 0.0, share.share, f"{names[-1]}: {share}"))
            whiskers.append((lane, share.low, share.high))
        bars.append(Spans("", point.color, tuple(spans)))
    targets = sorted({point.target for point in points})
    rules = [Rule(target, f"target {100 * target:.4g} %", vertical=True) for target in targets]
    return Plot(
        "attainment",
        "SLO attainment",
        Axis("share of requests within their objectives", "share", low=0.0, high=1.0),
        Lanes(tuple(names)),
        (*bars, Whiskers(tuple(whiskers)), *rules),
        "A failed request is a miss. Whiskers are 95 % intervals (Wilson, for the effective number "
        "of independent requests).",
    )


def _attainment_row(point: LoadPoint) -> tuple[str, ...]:
    joint = point.share("joint")
    return (
        point.name,
        compact(point.rate_per_accelerator),
        f"{joint.share:.1%}",
        between(joint.low, joint.high, "share"),
        f"{point.share('TTFT').share:.1%}",
        f"{point.share('TPOT').share:.1%}",
    )


def pareto(sides: Sequence[Side]) -> Plot:
    """Output tokens per second and accelerator, against how fast one reader's tokens come."""
    layers: list[Layer] = []
    rows: Rows = [
        ("target", "rate", "tokens/s per accelerator", "tokens/s per reader", "median TPOT")
    ]
    for name, points in load_points(sides).items():
        line: list[tuple[float, float]] = []
        tips: list[str] = []
        for point in points:
            tpot_s = point.median_tpot_s
            if not tpot_s:
                continue
            line.append((1.0 / tpot_s, point.tokens_per_s))
            both = (compact(point.tokens_per_s), compact(1.0 / tpot_s))
            tips.append(
                f"{name} at {compact(point.rate)}/s: {both[0]} tokens/s per accelerator at "
                f"{both[1]} tokens/s per reader"
            )
            rows.append((name, compact(point.rate), *both, seconds(tpot_s)))
        if line:
            layers.append(Line(name, points[0].color, tuple(line), dots=True, tips=tuple(tips)))
    return Plot(
        "pareto",
        "Throughput against interactivity",
        Axis("tokens/s of one reader (1 / median TPOT)", "rate", low=0.0),
        Axis("output tokens/s per accelerator", "rate", low=0.0),
        tuple(layers),
        "Up and to the right is better. One point per rate, joined in the order of the rates; all "
        "accelerators of a target count, idle ones as well.",
        table=tuple(rows),
    )


def goodput(sides: Sequence[Side]) -> Plot:
    """The highest measured rate at which the target's share was met, with what is not excluded."""
    bars: list[Spans] = []
    whiskers: list[tuple[int, float, float]] = []
    texts: list[tuple[int, float, str]] = []
    rows: Rows = [("target", "goodput per accelerator", "surely at least", "at most")]
    judged = load_points([side for side in sides if side.slo is not None])
    if all(len(points) == 1 for points in judged.values()):
        judged = {}  # one rate says nothing of where the limit is
    for lane, (name, points) in enumerate(judged.items()):
        best, low, high = goodput_range(points)
        tip = f"{name}: {compact(best)} requests/s per accelerator"
        bars.append(Spans("", points[0].color, (Span(lane, 0.0, best, tip),)))
        whiskers.append((lane, low, high))
        is_open = best == high == points[-1].rate_per_accelerator
        texts.append((lane, max(best, high), f"{'≥ ' if is_open else ''}{compact(best)}/s"))
        at_most = "above all that was measured" if is_open else compact(high)
        rows.append((name, compact(best), compact(low), at_most))
    return Plot(
        "goodput",
        "Goodput per accelerator",
        Axis(RATE_LABEL, "rate", low=0.0),
        Lanes(tuple(judged)),
        (*bars, Whiskers(tuple(whiskers)), LaneText(tuple(texts))),
        "The highest rate of this report at which every kind of request met its target. The "
        "whisker goes from the highest rate whose intervals all lie above the target to the "
        "highest whose intervals still hold it.",
        table=tuple(rows) if len(rows) > 1 else (),
    )


def goodput_range(points: Sequence[LoadPoint]) -> tuple[float, float, float]:
    """(measured, surely, perhaps): rates per accelerator of one target, which come in rising order.

    A rate counts only if all lower ones do: attainment that comes back is luck.
    """
    found = []
    for end in ("share", "low", "high"):
        best = 0.0
        for point in points:
            if not point.attains(end):
                break
            best = point.rate_per_accelerator
        found.append(best)
    return found[0], found[1], found[2]


def send_lag(sides: Sequence[Side]) -> Plot:
    """Requested against achieved: how late the driver itself was, by request."""
    layers: list[Layer] = []
    for side in sides:
        late = sorted(max(0.0, r.sent_s - r.intended_s) for r in side.records)
        points = tuple(((index + 1) / len(late), at) for index, at in enumerate(late))
        kept = points[:: max(1, len(points) // 200)]
        layers.append(Line(side.name, side.color, (*kept, *points[-1:])))
    return Plot(
        "send-lag",
        "How late the driver sent",
        Axis("share of requests", "share", low=0.0, high=1.0),
        Axis("sent after the intended time", "s"),
        tuple(layers),
        "This is inside every latency above; a run is invalid where it is large against the SLO.",
    )
