"""Means and effects over seeds, each with its 95 % interval. Pure.

A seed draws the traffic; every policy sees the same traffic under the same seed. So an effect is
taken per seed, and its interval is that of paired values: what the traffic does to all of them
alike drops out. A ratio's interval is taken on its logarithm, so that it and its inverse agree.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.load.analysis.intervals import percentile

# 97.5 % point of Student's t for 1, 2, ... 30 degrees of freedom; beyond, the normal one is near.
T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
NORMAL_975 = 1.96


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure over seeds and where the truth lies with 95 % confidence."""

    value: float
    low: float
    high: float
    num_seeds: int

    def __str__(self) -> str:
        return f"{short(self.value)} [{short(self.low)}, {short(self.high)}]"

    def excludes(self, value: float) -> bool:
        """Whether the interval does not hold ``value``."""
        return not self.low <= value <= self.high


def short(value: float) -> str:
    """Three digits that matter, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 6)}f}"


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean over seeds, with Student's interval."""
    mean = statistics.fmean(values)
    half = _half_width(values)
    return Estimate(mean, mean - half, mean + half, len(values))


def difference(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """How much larger, seed by seed."""
    return mean_of([one - other for one, other in zip(values, baseline, strict=True)])


def ratio(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """How many times as large, seed by seed: the geometric mean of the ratios."""
    logs = [math.log(one / other) for one, other in zip(values, baseline, strict=True)]
    found = mean_of(logs)
    return Estimate(math.exp(found.value), math.exp(found.low), math.exp(found.high), len(logs))


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the least-squares line through the points."""
    return statistics.linear_regression(xs, ys).slope


def pick(rows: Sequence[Mapping[str, Any]], figure: str, **where: object) -> list[float]:
    """A figure of all rows that have it and match, in their order: one for each seed."""
    return [
        row[figure]
        for row in rows
        if figure in row and all(row.get(key) == value for key, value in where.items())
    ]


def _half_width(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.inf
    freedom = len(values) - 1
    t = T_975[freedom - 1] if freedom <= len(T_975) else NORMAL_975
    return t * statistics.stdev(values) / math.sqrt(len(values))


def tail(values: Sequence[float], share: float = 0.99) -> float:
    """The smallest value that at least ``share`` of them do not exceed."""
    return percentile(sorted(values), share)
