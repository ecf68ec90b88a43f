"""How sure a figure is: intervals of shares and of percentiles, and when to print none.

Requests of one run are not independent: who waits behind a slow one is slow as well. So both
intervals count *effective* observations, ``n`` divided by the integrated autocorrelation time of
what is counted, taken in order of the intended times (Sokal 1997, with his window).
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import msgspec
import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
_WINDOW = 5.0  # Sokal's c: sum autocorrelations up to this many autocorrelation times
_MAX_LAG_SHARE = 0.25  # beyond a quarter of the series an autocorrelation is mostly noise


class Share(msgspec.Struct, frozen=True):
    """How many of how many, and the interval of the share behind it."""

    num_met: int
    num: int
    low: float
    high: float
    num_effective: float

    @property
    def share(self) -> float:
        return self.num_met / self.num if self.num else math.nan

    def __str__(self) -> str:
        if not self.num:
            return "no requests"
        return f"{self.share:.1%} ({self.low:.1%} to {self.high:.1%}), {self.num_met} of {self.num}"


def wilson(num_met: float, num: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval of a share (Wilson 1927); ``num`` may be an effective number."""
    if num <= 0:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    p = num_met / num
    middle = (p + z2 / (2 * num)) / (1 + z2 / num)
    half = math.sqrt(z2 * (p * (1 - p) / num + z2 / (4 * num * num))) / (1 + z2 / num)
    return max(0.0, middle - half), min(1.0, middle + half)


def share_of(hits: Sequence[bool], confidence: float = CONFIDENCE) -> Share:
    """The share of true ones in a series that is in order of time."""
    num, num_met = len(hits), sum(hits)
    effective = num / correlation_time(np.asarray(hits, dtype=float)) if num else 0.0
    low, high = wilson(num_met / num * effective if num else 0.0, effective, confidence)
    return Share(num_met, num, low, high, effective)


def correlation_time(series: NDArray[np.float64]) -> float:
    """By how much a series in order of time counts less than as many independent values; >= 1.

    Corrected for its bias and raised by its standard error (Wolff 2004): an interval that is a bit
    too wide costs a longer run, one that is too narrow costs trust.
    """
    num = len(series)
    centred = series - series.mean() if num else series
    variance = float(centred @ centred)
    if num < 8 or variance <= 1e-12 * num:
        return 1.0
    size = 1 << (2 * num - 1).bit_length()
    spectrum = np.fft.rfft(centred, size)
    products = np.fft.irfft(spectrum * np.conj(spectrum), size)[: max(2, int(num * _MAX_LAG_SHARE))]
    sums = 2.0 * np.cumsum(products / variance) - 1.0
    within = np.arange(len(sums)) >= _WINDOW * sums
    window = int(np.argmax(within)) if within.any() else len(sums) - 1
    reach = (2 * window + 1) / num
    return max(1.0, float(sums[window]) * (1 + reach) * (1 + math.sqrt(2 * reach)))


def min_samples(q: float, confidence: float = CONFIDENCE) -> int:
    """From how many values on the ``q`` quantile can be bounded at all: 29, 59, 299, 2995, ...

    The largest of ``n`` values lies above the quantile with probability ``1 - q**n``.
    """
    return math.ceil(math.log(1 - confidence) / math.log(max(q, 1 - q)))


def percentile(ordered: Sequence[float], q: float) -> float:
    """The smallest value that at least ``q`` of the values do not exceed (nearest rank)."""
    return ordered[max(0, math.ceil(round(q * len(ordered), 9)) - 1)]


def percentile_ranks(
    q: float, num: float, confidence: float = CONFIDENCE
) -> tuple[int | None, int | None]:
    """Ranks (from 1) of the order statistics that bound the ``q`` quantile of ``num`` values.

    The number of values below the quantile is binomial; each end leaves out at most half of what
    the interval may miss. None where the sample is too small to have that end.
    """
    whole = int(num)
    if whole < 1:
        return None, None
    below = _binomial_cdf(whole, q)
    alpha = (1 - confidence) / 2
    low = int(np.searchsorted(below, alpha, side="right"))
    high = int(np.searchsorted(below, 1 - alpha, side="left")) + 1
    return (low if low >= 1 else None), (high if high <= whole else None)


def _binomial_cdf(num: int, q: float) -> NDArray[np.float64]:
    """P(at most k of ``num``) for k from 0 to ``num``, by logarithms: no factorial overflows."""
    k = np.arange(1, num + 1)
    steps = np.log((num - k + 1) / k) + math.log(q) - math.log1p(-q)
    logs = np.concatenate(([0.0], np.cumsum(steps))) + num * math.log1p(-q)
    sums: NDArray[np.float64] = np.cumsum(np.exp(logs))
    return np.minimum(sums, 1.0, out=sums)


def percentile_interval(
    values: Sequence[float], q: float, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The interval of the ``q`` quantile of values in order of time; an end off the sample is
    infinite."""
    num = len(values)
    if num == 0:
        return -math.inf, math.inf
    array = np.asarray(values, dtype=float)
    ordered = np.sort(array)
    above = (array > ordered[max(0, math.ceil(round(q * num, 9)) - 1)]).astype(float)
    effective = num / correlation_time(above)
    low, high = percentile_ranks(q, effective, confidence)
    stretch = num / int(effective) if effective >= 1 else math.inf
    return (
        -math.inf if low is None else float(ordered[int((low - 1) * stretch)]),
        math.inf if high is None else float(ordered[min(num, math.ceil(high * stretch)) - 1]),
    )
