"""Goodput by search: the highest rate at which every kind of request attains its target.

1. ``Search.next_rate`` doubles or halves until one rate has passed and one has failed, then bisects
   (on a logarithmic scale) until they are close.
2. At each rate, rounds with other seeds are run until ``judge`` is sure: as soon as an interval
   excludes the target, at the latest after all rounds.

Nothing here runs anything: see sweep.py.
"""

import math
from collections.abc import Sequence

import msgspec

from bench.load.analysis.intervals import CONFIDENCE, Share, min_samples, share_of
from bench.load.analysis.slo import Slo
from bench.load.record import CANCELLED, RequestRecord

Rounds = Sequence[Sequence[RequestRecord]]


class Verdict(msgspec.Struct, frozen=True):
    """On one rate."""

    passed: bool
    is_sure: bool
    """Whether the interval excluded the target; else the estimate decided."""
    shares: dict[str, Share]
    """Attainment by kind, over all rounds."""


class Point(msgspec.Struct, frozen=True):
    """One rate that was tried."""

    rate: float
    verdict: Verdict
    num_rounds: int
    folders: tuple[str, ...] = ()


class Goodput(msgspec.Struct, frozen=True):
    """Where the search ended, in requests per second."""

    low: float | None
    """The highest rate that passed; None when even the lowest one tried failed."""
    high: float | None
    """The lowest rate that failed; None when even the highest one tried passed."""
    num_accelerators: int
    points: tuple[Point, ...]

    @property
    def per_accelerator(self) -> tuple[float | None, float | None]:
        """Counting all of them: prefill, decode, idle."""
        return (
            None if self.low is None else self.low / self.num_accelerators,
            None if self.high is None else self.high / self.num_accelerators,
        )


def judge(
    rounds: Rounds, slo: Slo, *, max_rounds: int, min_requests: int = min_samples(0.99)
) -> Verdict | None:
    """What the rounds so far prove of a rate; None asks for another round.

    Looking more than once gives chance more than one opportunity: each look has its part of the
    error only (Bonferroni). A rate passes with at least ``min_requests`` of each kind; to fail, a
    kind needs only an interval below its target.
    """
    confidence = 1 - (1 - CONFIDENCE) / max_rounds
    hits: dict[str, list[bool]] = {}
    for records in rounds:
        for record in sorted(records, key=lambda record: record.intended_s):
            if record.outcome != CANCELLED:
                hits.setdefault(record.kind, []).append(slo.of(record.kind).met(record))
    shares = {kind: share_of(series, confidence) for kind, series in sorted(hits.items())}
    targets = {kind: slo.of(kind).target for kind in shares}
    if any(share.high < targets[kind] for kind, share in shares.items()):
        return Verdict(False, True, shares)
    is_large = bool(shares) and all(share.num >= min_requests for share in shares.values())
    if is_large and all(share.low >= targets[kind] for kind, share in shares.items()):
        return Verdict(True, True, shares)
    if len(rounds) < max_rounds:
        return None
    by_estimate = all(share.share >= targets[kind] for kind, share in shares.items())
    return Verdict(bool(shares) and by_estimate, False, shares)


def most_missed(slo: Slo, num_requests: int) -> int:
    """How many of so many requests may miss before the targets are out of reach.

    By the lowest target of all: a run that is over that has at least one kind that is over its own.
    """
    lowest = min((o.target for o in slo.objectives.values()), default=slo.of("").target)
    return math.floor((1 - lowest) * num_requests + 1e-9)


class Search:
    """Which rate to try next.

    Args:
        start: where to begin.
        lowest, highest: never beyond these.
        tolerance: end when the failed rate is at most this much above the passed one.
    """

    def __init__(
        self, start: float, *, lowest: float, highest: float, tolerance: float = 0.05
    ) -> None:
        self._start = min(max(start, lowest), highest)
        self._lowest, self._highest, self._tolerance = lowest, highest, tolerance
        self.low: float | None = None
        self.high: float | None = None

    def next_rate(self) -> float | None:
        """None when the search is over."""
        if self.low is None and self.high is None:
            return self._start
        if self.low is None:
            assert self.high is not None
            return None if self.high <= self._lowest else max(self._lowest, self.high / 2)
        if self.high is None:
            return None if self.low >= self._highest else min(self._highest, self.low * 2)
        if self.high <= self.low * (1 + self._tolerance):
            return None
        return math.sqrt(self.low * self.high)

    def update(self, rate: float, *, passed: bool) -> None:
        """What came of a rate."""
        if passed:
            self.low = max(self.low or 0.0, rate)
        else:
            self.high = min(self.high or math.inf, rate)
