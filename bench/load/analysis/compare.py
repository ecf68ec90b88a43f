"""Two or more targets against each other: ratios of what they did to the same requests.

The targets took turns, block by block (``bench.load.alternation``), and request *i* of a block is
the same for all. Both are used: blocks and, in them, pairs of requests are drawn again and again
with replacement, a pair always together, and the interval of a ratio is what 95 % of the draws
give. So what slows the machine for a while hits both sides of a pair's block, and what differs
between blocks widens the interval.

A failed request ranks above every latency. A percentile that one side's sample is too small for, or
that falls among its failures, has no ratio.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.load.analysis.intervals import min_samples
from bench.load.analysis.metrics import e2e_of, gaps_of, ttft_of
from bench.load.analysis.slo import Slo, tpot_of
from bench.load.record import CANCELLED, OK, RequestRecord
from protocol.errors import ConfigError

COMPARISON_VERSION = 1
CONFIDENCE = 0.95
STATISTICS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}

Word = Literal["better", "worse", "same", "unclear"]
Outcome = Literal["pass", "fail", "unclear", "invalid"]
Array = NDArray[np.float64]
Counts = NDArray[np.int64]
Reader = Callable[[RequestRecord], float | None]
Sides = tuple[Sequence[RequestRecord], Sequence[RequestRecord]]


class Row(msgspec.Struct, frozen=True):
    """One statistic of both sides. ``ratio`` is target / base, or their difference for shares."""

    name: str
    metric: str
    statistic: str
    unit: str
    base: float | None = None
    target: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    num_pairs: int = 0
    verdict: Word = "unclear"
    is_difference: bool = False
    refused: str = ""


class Pair(msgspec.Struct, frozen=True):
    """One target against the base."""

    base: str
    target: str
    num_pairs: int
    rows: tuple[Row, ...]


class Settings(msgspec.Struct, frozen=True):
    """How a comparison is made."""

    seed: int = 0
    tolerance: float = 0.05
    """A ratio within 1 / (1 + tolerance) and 1 + tolerance is no difference."""
    share_tolerance: float = 0.01
    num_draws: int = 1000


class Gate(msgspec.Struct, frozen=True):
    """A limit for a ratio (or a difference) of every pair, as ``ttft_s.p90=1.1``."""

    metric: str
    statistic: str
    limit: float


class Comparison(msgspec.Struct, frozen=True):
    """What ``compare.json`` holds."""

    version: int
    metrics_version: str
    base: str
    num_blocks: int
    confidence: float
    tolerance: float
    seed: int
    pairs: tuple[Pair, ...]
    verdict: Outcome
    reasons: tuple[str, ...]


# ---- what is compared --------------------------------------------------------------------------


def _max_gap(record: RequestRecord) -> float | None:
    return max(gaps_of(record), default=None)


METRICS: dict[str, tuple[str, Reader]] = {
    "ttft_s": ("TTFT", ttft_of),
    "tpot_s": ("TPOT", tpot_of),
    "max_gap_s": ("longest gap", _max_gap),
    "e2e_s": ("E2E", e2e_of),
}


class _Column:
    """One metric of one side of all pairs: infinite where it failed, NaN where it has no value.

    A draw is the number of times that it holds each pair, so nothing is sorted twice.
    """

    def __init__(self, records: Sequence[RequestRecord], read: Reader) -> None:
        found = [read(record) if record.outcome == OK else math.inf for record in records]
        self.values: Array = np.asarray([math.nan if v is None else v for v in found], dtype=float)
        self.order = np.argsort(self.values)[: int(np.sum(~np.isnan(self.values)))]
        self.ordered: Array = self.values[self.order]

    def percentile(self, counts: Counts, q: float) -> float:
        """By nearest rank, as the metrics have it; infinite among failures."""
        below = np.cumsum(counts[self.order])
        if not len(below) or not below[-1]:
            return math.nan
        rank = max(1, math.ceil(round(q * float(below[-1]), 9)))
        return float(self.ordered[int(np.searchsorted(below, rank))])


class _Draws:
    """How often each draw holds each pair: first blocks are drawn, then pairs of each."""

    def __init__(self, blocks: Sequence[int], settings: Settings) -> None:
        known = np.asarray(blocks)
        members = [np.flatnonzero(known == block) for block in sorted(set(blocks))]
        random = np.random.default_rng(settings.seed)
        self.settings = settings
        self.num_pairs = len(blocks)
        self.all: list[Counts] = []
        for _ in range(settings.num_draws if members else 0):
            chosen = random.integers(len(members), size=len(members))
            drawn = [random.choice(members[block], size=len(members[block])) for block in chosen]
            self.all.append(np.bincount(np.concatenate(drawn), minlength=self.num_pairs))

    def interval(self, statistic: Callable[[Counts], float]) -> tuple[float, float] | None:
        """What 95 % of the draws give; None where too many of them give nothing."""
        found = [value for counts in self.all if math.isfinite(value := statistic(counts))]
        if not found or len(found) < CONFIDENCE * len(self.all):
            return None
        low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return float(low), float(high)


def block_of(index: int, block_starts: Sequence[int]) -> int:
    """Which block a request's index lies in."""
    return bisect_right(block_starts, index) - 1


def compare(
    records: Sequence[RequestRecord],
    names: Sequence[str],
    block_starts: Sequence[int],
    slo: Slo | None = None,
    settings: Settings | None = None,
) -> list[Pair]:
    """Every target after the first one in ``names`` against that.

    Args:
        block_starts: the first index of each block, rising from 0.
    """
    settings = settings or Settings()
    by_target: dict[str, dict[int, RequestRecord]] = {name: {} for name in names}
    for record in records:
        if record.target in by_target:
            by_target[record.target][record.index] = record
    base = names[0]
    pairs = []
    for name in names[1:]:
        shared = sorted(by_target[base].keys() & by_target[name].keys())
        both = [(by_target[base][index], by_target[name][index]) for index in shared]
        kept = [pair for pair in both if all(record.outcome != CANCELLED for record in pair)]
        blocks = [block_of(of_base.index, block_starts) for of_base, _ in kept]
        draws = _Draws(blocks, settings)
        sides = [of_base for of_base, _ in kept], [of_target for _, of_target in kept]
        rows = [row for metric in METRICS for row in _latency_rows(metric, sides, draws)]
        pairs.append(Pair(base, name, len(kept), (*rows, *_share_rows(sides, draws, slo))))
    return pairs


def _latency_rows(metric: str, sides: Sides, draws: _Draws) -> list[Row]:
    words, read = METRICS[metric]
    base, target = (_Column(side, read) for side in sides)
    both = np.isfinite(base.values) & np.isfinite(target.values)
    positive = both & (base.values > 0) & (target.values > 0)
    logs = np.log(target.values[positive] / base.values[positive])

    def paired(counts: Counts) -> float:
        own = counts[positive]
        return math.exp(float(own @ logs) / float(own.sum())) if own.any() else math.nan

    def mean(column: _Column, counts: Counts) -> float:
        own = counts[both]
        return float(own @ column.values[both]) / float(own.sum()) if own.any() else math.nan

    num = int(both.sum())
    found = [
        _Ratio("paired", f"{words}, request by request", lambda counts: (1.0, paired(counts))),
        _Ratio("mean", f"{words}, mean", lambda c: (mean(base, c), mean(target, c))),
    ]
    for name, q in STATISTICS.items():
        found.append(
            _Ratio(
                name,
                f"{words}, {name}",
                _percentiles(base, target, q),
                min_samples(q),
            )
        )
    return [ratio.row(metric, num, draws) for ratio in found]


def _percentiles(
    base: _Column, target: _Column, q: float
) -> Callable[[Counts], tuple[float, float]]:
    return lambda counts: (base.percentile(counts, q), target.percentile(counts, q))


class _Ratio(msgspec.Struct, frozen=True):
    """A statistic of both sides as a function of a draw."""

    statistic: str
    name: str
    values: Callable[[Counts], tuple[float, float]]
    min_pairs: int = 2

    def row(self, metric: str, num: int, draws: _Draws) -> Row:
        base, target = self.values(np.ones(draws.num_pairs, dtype=np.int64))
        is_paired = self.statistic == "paired"
        shown = [None if is_paired or not math.isfinite(at) else at for at in (base, target)]
        row = Row(self.name, metric, self.statistic, "s", shown[0], shown[1], num_pairs=num)
        if num < self.min_pairs:
            why = f"n too small: {num} of {self.min_pairs}"
            return msgspec.structs.replace(row, base=None, target=None, refused=why)
        interval = draws.interval(lambda counts: _quotient(*self.values(counts)))
        ratio = _quotient(base, target)
        if interval is None or not math.isfinite(ratio):
            return msgspec.structs.replace(row, refused="too many failed")
        low, high = interval
        most = 1 + draws.settings.tolerance
        verdict = judge(low, high, 1 / most, most)
        return msgspec.structs.replace(row, ratio=ratio, low=low, high=high, verdict=verdict)


def _quotient(base: float, target: float) -> float:
    return target / base if math.isfinite(base) and math.isfinite(target) and base else math.nan


def judge(low: float, high: float, least: float, most: float) -> Word:
    """Of an interval whose small values are good; a difference within the limits is none."""
    if least <= low and high <= most:
        return "same"
    middle = math.sqrt(least * most) if least > 0 else (least + most) / 2
    if high < middle:
        return "better"
    return "worse" if low > middle else "unclear"


def _share_rows(sides: Sides, draws: _Draws, slo: Slo | None) -> list[Row]:
    """Differences of shares: large ones are good, so the verdict is of what is missing."""
    answered = [np.asarray([r.outcome == OK for r in side], dtype=float) for side in sides]
    rows = [_difference("answered", "answered", answered, draws)]
    if slo is not None:
        met = [np.asarray([slo.of(r.kind).met(r) for r in s], dtype=float) for s in sides]
        rows.append(_difference("attainment", "SLO attainment", met, draws))
    return rows


def _difference(metric: str, words: str, hits: Sequence[Array], draws: _Draws) -> Row:
    base, target = hits
    num = draws.num_pairs
    if num < 2:
        return Row(words, metric, "share", "share", num_pairs=num, refused="n too small")
    change = target - base
    interval = draws.interval(lambda counts: float(counts @ change) / float(counts.sum()))
    assert interval is not None, "a share is finite in every draw"
    low, high = interval
    least = draws.settings.share_tolerance
    return Row(
        words,
        metric,
        "share",
        "share",
        float(base.mean()),
        float(target.mean()),
        float(change.mean()),
        low,
        high,
        num,
        judge(-high, -low, -least, least),
        is_difference=True,
    )


# ---- what follows from it ----------------------------------------------------------------------


def parse_gate(text: str) -> Gate:
    """``ttft_s.p90=1.1``: the ratio's interval must not lie above 1.1 as a whole.

    Raises:
        ConfigError: it is not of that form, or names what is not compared.
    """
    name, _, limit = text.partition("=")
    metric, _, statistic = name.partition(".")
    known = {"paired", "mean", *STATISTICS}
    if metric not in METRICS or statistic not in known:
        names = f"{', '.join(METRICS)} and {', '.join(sorted(known))}"
        raise ConfigError(f"gate {text!r}: METRIC.STATISTIC=LIMIT, of {names}")
    try:
        return Gate(metric, statistic, float(limit))
    except ValueError as error:
        raise ConfigError(f"gate {text!r}: the limit must be a number") from error


def conclude(
    pairs: Sequence[Pair], gates: Sequence[Gate], *, strict: bool = False
) -> tuple[Outcome, tuple[str, ...]]:
    """Whether every gate holds for every pair, and which do not.

    A gate fails where the whole interval lies above its limit. One whose interval holds the limit,
    or that has no ratio, is unclear; ``strict`` counts that as a failure.
    """
    failed: list[str] = []
    unclear: list[str] = []
    for pair in pairs:
        rows = {(row.metric, row.statistic): row for row in pair.rows}
        for gate in gates:
            row = rows[gate.metric, gate.statistic]
            where = f"{pair.target} against {pair.base}: {row.name}"
            if row.ratio is None or row.low is None or row.high is None:
                unclear.append(f"{where} has no ratio: {row.refused}")
                continue
            told = (
                f"{where} {row.ratio:.3f} ({row.low:.3f} to {row.high:.3f}), limit {gate.limit:g}"
            )
            if row.low > gate.limit:
                failed.append(told)
            elif row.high > gate.limit:
                unclear.append(told)
    if failed or (unclear and strict):
        return "fail", (*failed, *unclear)
    return ("unclear", tuple(unclear)) if unclear else ("pass", ())
