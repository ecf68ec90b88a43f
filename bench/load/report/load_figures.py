"""Plots over the load: attainment against rate, throughput against interactivity, goodput."""

from collections.abc import Sequence

from bench.load.intervals import Share
from bench.load.report.plot import (
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
from bench.load.report.runs import Side
from bench.load.report.scale import compact, seconds

PARTS: tuple[tuple[str, Dashes], ...] = (("TTFT", "dash"), ("TPOT", "dot"))
RATE_LABEL = "offered requests/s per accelerator"


def by_target(sides: Sequence[Side]) -> dict[str, list[Side]]:
    """Sides by the target's name, each by rising rate."""
    found: dict[str, list[Side]] = {}
    for side in sorted(sides, key=lambda side: side.rate_per_accelerator):
        found.setdefault(side.name, []).append(side)
    return found


def joint_of(side: Side) -> Share:
    """How many requests met all of their objectives at once."""
    assert side.summary.attainment is not None
    return side.summary.attainment


def parts_of(side: Side) -> dict[str, Share]:
    """How many met each of the two alone."""
    first, following = side.summary.attainment_ttft, side.summary.attainment_tpot
    assert first is not None
    assert following is not None
    return {"TTFT": first, "TPOT": following}


def target_of(side: Side) -> float:
    """The share that has to meet its objectives: the strictest kind's."""
    assert side.summary.target is not None
    return side.summary.target


def attainment(sides: Sequence[Side]) -> Plot:
    """Share of all requests that met their objectives, against the offered rate."""
    layers: list[Layer] = []
    rows: list[tuple[str, ...]] = [
        ("target", "rate per accelerator", "joint", "95 % interval", "TTFT only", "TPOT only")
    ]
    judged = _judged(sides)
    for name, own in by_target(judged).items():
        color = own[0].color
        joint = [(side.rate_per_accelerator, joint_of(side)) for side in own]
        layers.append(Band(color, tuple((x, share.low, share.high) for x, share in joint)))
        points = tuple((x, share.share) for x, share in joint)
        tips = tuple(f"{name} at {compact(x)}/s per accelerator: {share}" for x, share in joint)
        layers.append(Line(f"{name}, joint", color, points, dots=True, tips=tips))
        for part, dashes in PARTS:
            alone = tuple((s.rate_per_accelerator, parts_of(s)[part].share) for s in own)
            layers.append(Line(f"{name}, {part} only", color, alone, dashes, dots=len(own) == 1))
        rows += [_attainment_row(side) for side in own]
    for target in sorted({target_of(side) for side in judged}):
        layers.append(Rule(target, f"target {target:.0%}"))
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


def _judged(sides: Sequence[Side]) -> list[Side]:
    return [side for side in sides if side.slo is not None and side.records]


def _attainment_row(side: Side) -> tuple[str, ...]:
    joint = joint_of(side)
    return (
        side.name,
        compact(side.rate_per_accelerator),
        f"{joint.share:.1%}",
        f"{joint.low:.1%} to {joint.high:.1%}",
        f"{parts_of(side)['TTFT'].share:.1%}",
        f"{parts_of(side)['TPOT'].share:.1%}",
    )


def pareto(sides: Sequence[Side]) -> Plot:
    """Output tokens per second and accelerator, against how fast one reader's tokens come."""
    layers: list[Layer] = []
    rows: list[tuple[str, ...]] = [
        ("target", "rate", "tokens/s per accelerator", "tokens/s per reader", "median TPOT")
    ]
    for name, own in by_target(sides).items():
        points: list[tuple[float, float]] = []
        tips: list[str] = []
        for side in own:
            found = side.summary.metrics.get("tpot_s")
            if found is None or not found.p50:
                continue
            tpot = found.p50
            throughput = side.summary.throughput.output_tokens / side.num_accelerators
            points.append((1.0 / tpot, throughput))
            tips.append(
                f"{name} at {compact(side.run.rate)}/s: {compact(throughput)} tokens/s per "
                f"accelerator at {compact(1 / tpot)} tokens/s per reader"
            )
            cells = (compact(side.run.rate), compact(throughput), compact(1 / tpot), seconds(tpot))
            rows.append((name, *cells))
        if points:
            line = Line(name, own[0].color, tuple(points), dots=True, tips=tuple(tips))
            layers.append(line)
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
    names: list[str] = []
    bars: list[Spans] = []
    whiskers: list[tuple[int, float, float]] = []
    texts: list[tuple[int, float, str]] = []
    rows: list[tuple[str, ...]] = [
        ("target", "goodput per accelerator", "surely at least", "at most")
    ]
    judged = _judged(sides)
    for lane, (name, own) in enumerate(by_target(judged).items()):
        best, low, high = goodput_range(own)
        names.append(name)
        tip = f"{name}: {compact(best)} requests/s per accelerator"
        bars.append(Spans("", own[0].color, (Span(lane, 0.0, best, tip),)))
        whiskers.append((lane, low, high))
        is_open = high >= own[-1].rate_per_accelerator and best == high
        texts.append((lane, max(best, high), f"{'≥ ' if is_open else ''}{compact(best)}/s"))
        at_most = "above all that was measured" if is_open else compact(high)
        rows.append((name, compact(best), compact(low), at_most))
    return Plot(
        "goodput",
        "Goodput per accelerator",
        Axis(RATE_LABEL, "rate", low=0.0),
        Lanes(tuple(names)),
        (*bars, Whiskers(tuple(whiskers)), LaneText(tuple(texts))),
        "The highest rate of this report at which the target's share was met. The whisker goes "
        "from the highest rate whose whole interval meets it to the highest whose interval still "
        "holds it.",
        table=tuple(rows) if len(rows) > 1 else (),
    )


def goodput_range(own: Sequence[Side]) -> tuple[float, float, float]:
    """(measured, surely, perhaps): rates per accelerator of one target's sides, by rising rate.

    A rate counts only if all lower ones do: attainment that comes back is luck.
    """
    found = [0.0, 0.0, 0.0]
    for index in range(3):
        for side in own:
            if not _attains(side, index):
                break
            found[index] = side.rate_per_accelerator
    return found[0], found[1], found[2]


def _attains(side: Side, index: int) -> bool:
    """Whether every kind's share, or the low or high end of its interval, meets its target."""
    for kind in side.summary.by_kind.values():
        share, target = kind.attainment, kind.target
        if share is None or target is None or not share.num:
            continue
        if (share.share, share.low, share.high)[index] < target:
            return False
    return True


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
