"""Plots over the run's time: latency, requests in flight and tokens per second on one time axis."""

from collections.abc import Sequence

from bench.load.metrics import ttft_of
from bench.load.report.plot import Axis, Layer, Line, Plot
from bench.load.report.runs import Side

NUM_SLICES = 48
X_LABEL = "seconds of the run"


def slices(sides: Sequence[Side]) -> list[Plot]:
    """Three plots with the same slices."""
    end_s = max((_end(side) for side in sides), default=1.0) or 1.0
    width_s = end_s / NUM_SLICES
    x = Axis(X_LABEL, "s", low=0.0, high=end_s)
    first, flight, tokens = [], [], []
    for side in sides:
        first += _first_tokens(side, width_s)
        flight.append(Line(side.name, side.color, _in_flight(side, width_s), steps=True))
        tokens.append(Line(side.name, side.color, _tokens(side, width_s), steps=True))
    return [
        Plot(
            "slices-ttft",
            "TTFT over the run",
            x,
            Axis("time to first token", "s", low=0.0),
            tuple(first),
            "By intended time. Solid: the median of a slice; dotted: its slowest request.",
            tab="TTFT",
        ),
        Plot(
            "slices-in-flight",
            "Requests in flight",
            x,
            Axis("requests sent and not finished", low=0.0),
            tuple(flight),
            "Ever more of them is a server that does not keep up: its latencies then depend on how "
            "long the run was.",
            tab="in flight",
        ),
        Plot(
            "slices-tokens",
            "Output tokens per second",
            x,
            Axis("output tokens/s", "rate", low=0.0),
            tuple(tokens),
            "By the time at which they arrived at the driver.",
            tab="tokens/s",
        ),
    ]


def _end(side: Side) -> float:
    return max((record.finished_s or record.intended_s for record in side.records), default=0.0)


def _first_tokens(side: Side, width_s: float) -> list[Layer]:
    by_slice: dict[int, list[float]] = {}
    for record in side.answered:
        at = ttft_of(record)
        if at is not None:
            by_slice.setdefault(int(record.intended_s / width_s), []).append(at)
    middle, worst = [], []
    for index, values in sorted(by_slice.items()):
        at = (index + 0.5) * width_s
        middle.append((at, sorted(values)[len(values) // 2]))
        worst.append((at, max(values)))
    return [
        Line(side.name, side.color, tuple(middle)),
        Line(f"{side.name}, slowest", side.color, tuple(worst), "dot"),
    ]


def _in_flight(side: Side, width_s: float) -> tuple[tuple[float, float], ...]:
    """At the start of each slice."""
    spans = [
        (record.sent_s, record.finished_s)
        for record in side.records
        if record.finished_s is not None and record.outcome != "unsent"
    ]
    return tuple(
        (at, float(sum(start <= at < end for start, end in spans)))
        for at in (index * width_s for index in range(NUM_SLICES + 1))
    )


def _tokens(side: Side, width_s: float) -> tuple[tuple[float, float], ...]:
    counts = [0] * (NUM_SLICES + 1)
    for record in side.records:
        for at, count in zip(record.token_times_s, record.token_counts, strict=False):
            counts[min(NUM_SLICES, max(0, int(at / width_s)))] += count
    return tuple((index * width_s, count / width_s) for index, count in enumerate(counts))
