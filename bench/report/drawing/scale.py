"""Axes: from values to pixels, where the ticks stand, and how a number is written."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.report.drawing.plot import Axis, Unit

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
NO_BREAK = "\u00a0"
LOG_FLOOR = 1e-6  # nothing that is drawn on a logarithmic axis is smaller: a microsecond


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from ``low`` to ``high`` on pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel; values outside are put on the border."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def scale(axis: Axis, values: Sequence[float], start: float, end: float) -> Scale:
    """A scale that holds all ``values``, with round limits where the axis leaves them open."""
    finite = [value for value in values if math.isfinite(value)]
    if axis.log:
        low, high = _log_limits(axis, [value for value in finite if value >= LOG_FLOOR])
    else:
        low, high = _linear_limits(axis, finite)
    return Scale(low, high, start, end, axis.log)


def _linear_limits(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    low = axis.low if axis.low is not None else min(values, default=0.0)
    high = axis.high if axis.high is not None else max(values, default=1.0)
    if high <= low:
        high = low + (abs(low) or 1.0)
    step = _step(high - low, 5)
    if axis.low is None:
        low = math.floor(low / step + 1e-9) * step
    if axis.high is None:
        high = math.ceil(high / step - 1e-9) * step
    return low, high


def _log_limits(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    low = axis.low if axis.low is not None else min(values, default=0.1)
    high = axis.high if axis.high is not None else max(values, default=1.0)
    if high <= low:
        low, high = low / 2.0, low * 2.0
    if axis.low is None:
        low = _log_round(low, down=True)
    if axis.high is None:
        high = _log_round(high, down=False)
    return low, high


def _log_round(value: float, *, down: bool) -> float:
    decade = 10.0 ** math.floor(math.log10(value) + 1e-12)
    candidates = [decade * step for step in (1.0, 2.0, 5.0, 10.0)]
    if down:
        return max((c for c in candidates if c <= value * (1 + 1e-9)), default=decade)
    return min(c for c in candidates if c >= value * (1 - 1e-9))


def _step(width: float, num_ticks: int) -> float:
    rough = width / max(1, num_ticks)
    decade = 10.0 ** math.floor(math.log10(rough))
    return decade * next(step for step in STEPS if decade * step >= rough * (1 - 1e-9))


def ticks(scale: Scale, num_ticks: int) -> list[float]:
    """About ``num_ticks`` round values inside the scale."""
    if scale.log:
        return _log_ticks(scale, num_ticks)
    return _even_ticks(scale, num_ticks)


def _even_ticks(scale: Scale, num_ticks: int) -> list[float]:
    step = _step(scale.high - scale.low, num_ticks)
    first = math.ceil(scale.low / step - 1e-9)
    last = math.floor(scale.high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(scale: Scale, num_ticks: int) -> list[float]:
    if scale.high < 10.0 * scale.low:
        return _even_ticks(scale, num_ticks)  # a decade has too few round values
    first = math.floor(math.log10(scale.low) + 1e-9)
    last = math.ceil(math.log10(scale.high) - 1e-9)
    choices = ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,))
    for steps in choices:
        found = [
            10.0**decade * step
            for decade in range(first, last + 1)
            for step in steps
            if scale.low * (1 - 1e-9) <= 10.0**decade * step <= scale.high * (1 + 1e-9)
        ]
        if len(found) <= num_ticks + 1:
            return found
    every = math.ceil(len(found) / num_ticks)
    return found[::every]


def tick_text(value: float, unit: Unit, others: Sequence[float]) -> str:
    """A tick's label; all ticks of an axis of seconds share one unit where it can be read."""
    if unit == "s":
        return _seconds_tick(value, others)
    if unit == "share":
        return f"{100 * value:.10g}".rstrip(".") + " %" if _is_round(value) else f"{value:.1%}"
    return compact(value)


def _is_round(value: float) -> bool:
    return math.isclose(100 * value, round(100 * value, 4), abs_tol=1e-9)


def _seconds_tick(value: float, others: Sequence[float]) -> str:
    if value == 0.0:
        return "0"
    largest = max((abs(other) for other in others), default=value)
    smallest = min((abs(other) for other in others if other), default=value)
    mixed = largest / smallest >= 30.0  # a logarithmic axis over several units
    pivot = abs(value) if mixed else largest
    if pivot < 1e-3:
        return f"{1e6 * value:.6g} µs"
    if pivot < 1.0:
        return f"{1e3 * value:.6g} ms"
    return f"{value:.6g} s"


def compact(value: float) -> str:
    """Four digits at most, with k and M."""
    size = abs(value)
    for limit, divisor, suffix in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit:
            return f"{value / divisor:.4g}{suffix}"
    return f"{value:.4g}"


def seconds(value: float | None) -> str:
    """A duration for people: three digits and the unit that fits; a dash for None."""
    if value is None or not math.isfinite(value):
        return "–"  # noqa: RUF001 - an en dash, as typeset tables have it
    size = abs(value)
    if size == 0.0:
        return "0 ms"
    if size < 1e-3:
        return f"{1e6 * value:.3g} µs"
    if size < 0.9995:
        return f"{_three(1e3 * value)} ms"
    return f"{_three(value)} s" if size < 1000.0 else f"{value:,.0f} s"


def _three(value: float) -> str:
    size = abs(value)
    if size >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"


def number(value: float | None, unit: Unit) -> str:
    """A value in a table, by its unit."""
    if value is None or not math.isfinite(value):
        return "–"  # noqa: RUF001
    if unit == "s":
        return seconds(value)
    if unit == "share":
        return f"{value:.1%}"
    return (
        f"{value:,.0f}"
        if unit == "tokens"
        else f"{value:.3g}"
        if abs(value) < 100
        else f"{value:,.0f}"
    )


def between(low: float, high: float, unit: Unit) -> str:
    """An interval, the unit once where both ends have the same; an end that is not known is "?"."""
    ends = [number(end, unit) if math.isfinite(end) else "?" for end in (low, high)]
    first, _, first_unit = ends[0].partition(" ")
    if first_unit and ends[1].partition(" ")[2] == first_unit:
        ends[0] = first
    elif unit == "share" and "?" not in ends:
        ends[0] = ends[0].removesuffix("%")
    return " to ".join(end.replace(" ", NO_BREAK) for end in ends)
