"""Plots over the run's time, one below the other: what users saw, by the driver's records."""

from collections.abc import Sequence

from bench.load.analysis.intervals import percentile
from bench.load.analysis.metrics import ttft_of
from bench.report.drawing.plot import Axis, Layer, Line, Plot
from bench.report.figures.phases import server_side
from bench.report.runs import Side

NUM_SLICES = 48
GUTTER = 62.0  # pixels left of the frame, so that all plots over time have one axis
X_LABEL = "seconds of the run"
UNITS = ((1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s"))


def time_axis(sides: Sequence[Side]) -> Axis:
    """The axis that all plots over time share: as long as the longest run."""
    return Axis(X_LABEL, "s", low=0.0, high=max((_end(side) for side in sides), default=0.0) or 1.0)


def slices(sides: Sequence[Side], x: Axis) -> list[Plot]:
    """First tokens, requests in flight, output tokens, and the KV that moved."""
    width_s = (x.high or 1.0) / NUM_SLICES
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
            "By intended time. Solid: the median of a slice; dotted: its p99 by nearest rank, "
            "which is the slowest request of a slice that has fewer than 100.",
            tab="TTFT",
            gutter=GUTTER,
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
            gutter=GUTTER,
        ),
        Plot(
            "slices-tokens",
            "Decode: output tokens per second",
            x,
            Axis("output tokens/s", "rate", low=0.0),
            tuple(tokens),
            "By the time at which they arrived at the driver.",
            tab="tokens/s",
            gutter=GUTTER,
        ),
        _transfers(sides, x, width_s),
    ]


def titled(title: str, shown: Sequence[Side], of: Sequence[Side]) -> str:
    """With the target's name where it is one of several: a single line has no legend."""
    return f"{title}: {shown[0].name}" if len(shown) == 1 < len(of) else title


def _end(side: Side) -> float:
    ends = [record.finished_s or record.intended_s for record in side.records]
    return max([*ends, *(sample.at_s for sample in side.samples)], default=0.0)


def _first_tokens(side: Side, width_s: float) -> list[Layer]:
    by_slice: dict[int, list[float]] = {}
    for record in side.answered:
        at = ttft_of(record)
        if at is not None:
            by_slice.setdefault(int(record.intended_s / width_s), []).append(at)
    middle, worst = [], []
    for index, values in sorted(by_slice.items()):
        at, ordered = (index + 0.5) * width_s, sorted(values)
        middle.append((at, percentile(ordered, 0.5)))
        worst.append((at, percentile(ordered, 0.99)))
    return [
        Line(f"{side.name}, p50", side.color, tuple(middle)),
        Line(f"{side.name}, p99", side.color, tuple(worst), "dot"),
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


def _transfers(sides: Sequence[Side], x: Axis, width_s: float) -> Plot:
    """Bytes per second from prefill to decode pools, by the requests' time lines."""
    found = [(side, rates) for side in sides if any(rates := _bytes_per_s(side, width_s))]
    largest = max((max(rates) for _, rates in found), default=0.0)
    divisor, unit = next((pair for pair in UNITS if largest >= pair[0]), (1.0, "B/s"))
    lines = tuple(
        Line(
            side.name,
            side.color,
            tuple((index * width_s, rate / divisor) for index, rate in enumerate(rates)),
            steps=True,
        )
        for side, rates in found
    )
    return Plot(
        "slices-transfers",
        titled("KV transfer rate", [side for side, _ in found], sides),
        x,
        Axis(f"KV from prefill to decode pools, {unit}", "rate", low=0.0),
        lines,
        "From the server's time lines: a hand-off's bytes are spread evenly over the time in which "
        "it had a read in flight, which is laid to end with its commit. A target without a line "
        "moved nothing, or has not told.",
        tab="KV transfer",
        gutter=GUTTER,
    )


def _bytes_per_s(side: Side, width_s: float) -> list[float]:
    sums = [0.0] * (NUM_SLICES + 1)
    for record in side.records:
        told = server_side(record)
        transfer = None if told is None else told.get("transfer")
        committed = None if told is None else told["events"].get("committed")
        if not isinstance(transfer, dict) or committed is None:
            continue
        num_bytes = float(transfer.get("num_bytes", 0))
        end_s = record.sent_s + float(committed)
        start_s = end_s - max(1e-6, float(transfer.get("read_s", 0.0)))
        first, last = (int(max(0.0, at) / width_s) for at in (start_s, end_s))
        for index in range(min(first, NUM_SLICES), min(last, NUM_SLICES) + 1):
            low, high = max(start_s, index * width_s), min(end_s, (index + 1) * width_s)
            sums[index] += num_bytes * max(0.0, high - low) / (end_s - start_s)
    return [total / width_s for total in sums]
