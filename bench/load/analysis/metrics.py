"""Every figure that is ever printed about requests, by the definitions of ``docs/metrics.md``.

The reports, the search for goodput and the comparisons import this file; nothing else computes a
latency. A definition that changes changes ``METRICS_VERSION``.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import msgspec

from bench.load.analysis.intervals import (
    Share,
    min_samples,
    percentile,
    percentile_interval,
    share_of,
)
from bench.load.analysis.slo import Objective, Slo, tpot_of
from bench.load.record import CANCELLED, OK, RequestRecord

METRICS_VERSION = "1.0"

QUANTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99}


class Distribution(msgspec.Struct, frozen=True):
    """One metric over many requests, tokens or gaps. A percentile is None where it is refused."""

    count: int
    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    interval: dict[str, tuple[float, float]]
    """95 %, by percentile; an end that the sample is too small to have is infinite."""
    refused: dict[str, str]
    """Why a percentile is not given."""
    num_failed: int = 0
    """Requests that never got this far. They rank above every value that was seen."""


class Throughput(msgspec.Struct, frozen=True):
    """Rates per second, over the time from the first intended request to the last answer's end."""

    span_s: float
    offered_requests: float
    completed_requests: float
    good_requests: float | None
    """Those that met their objective; None without an SLO."""
    prompt_tokens: float
    output_tokens: float
    cached_share: float | None = None
    """Of the prompt tokens, where the server told; not a rate."""


class Summary(msgspec.Struct, frozen=True):
    """A run, or one kind of its requests, in figures."""

    metrics_version: str
    num_requests: int
    outcomes: dict[str, int]
    metrics: dict[str, Distribution]
    throughput: Throughput
    attainment: Share | None
    """Of all but those that were cancelled by plan: TTFT, TPOT and E2E at once."""
    attainment_ttft: Share | None
    attainment_tpot: Share | None
    target: float | None
    by_kind: dict[str, "Summary"]

    @property
    def attains(self) -> bool | None:
        """Whether every kind's attainment is at least its target, taken at face value."""
        if self.attainment is None or self.target is None:
            return None
        if self.by_kind:
            return all(kind.attains is not False for kind in self.by_kind.values())
        return self.attainment.num == 0 or self.attainment.share >= self.target


def summarise(records: Sequence[RequestRecord], slo: Slo | None = None) -> Summary:
    """Every figure of these requests, over all and by kind."""
    ordered = sorted(records, key=lambda record: record.intended_s)
    kinds = sorted({record.kind for record in ordered})
    by_kind = {
        kind: _summary([record for record in ordered if record.kind == kind], slo) for kind in kinds
    }
    return msgspec.structs.replace(_summary(ordered, slo), by_kind=by_kind)


def after(records: Sequence[RequestRecord], warm_up_s: float) -> list[RequestRecord]:
    """Without the requests that were meant for the warm-up."""
    return [record for record in records if record.intended_s >= warm_up_s]


def _summary(records: Sequence[RequestRecord], slo: Slo | None) -> Summary:
    shares: list[Share | None] = [None, None, None]
    if slo is not None:
        judged = [record for record in records if record.outcome != CANCELLED]
        with_tpot = [r for r in judged if r.outcome != OK or tpot_of(r) is not None]
        shares = [
            share_of([slo.of(record.kind).met(record) for record in judged]),
            share_of([slo.of(record.kind).ttft_met(record) for record in judged]),
            share_of([slo.of(record.kind).tpot_met(record) for record in with_tpot]),
        ]
    targets = [slo.of(record.kind).target for record in records] if slo is not None else []
    return Summary(
        METRICS_VERSION,
        len(records),
        dict(Counter(record.outcome for record in records)),
        _metrics(records, slo),
        _throughput(records, slo),
        shares[0],
        shares[1],
        shares[2],
        max(targets, default=None),
        {},
    )


# ---- one request -------------------------------------------------------------------------------


def ttft_of(record: RequestRecord) -> float | None:
    """Seconds from the intended time to the first token."""
    return record.token_times_s[0] - record.intended_s if record.token_times_s else None


def ttft_sent_of(record: RequestRecord) -> float | None:
    """Seconds from sending to the first token: what harnesses that forgive themselves report."""
    return record.token_times_s[0] - record.sent_s if record.token_times_s else None


def e2e_of(record: RequestRecord) -> float | None:
    """Seconds from the intended time to the end of the answer."""
    return None if record.finished_s is None else record.finished_s - record.intended_s


def gaps_of(record: RequestRecord) -> list[float]:
    """Seconds between events that carried tokens."""
    times = record.token_times_s
    return [later - earlier for earlier, later in pairwise(times)]


def itls_of(record: RequestRecord) -> Iterator[float]:
    """Seconds per token after the first event: a gap that brought k tokens counts k times as 1/k.

    Nothing when the server did not say how many tokens its events carried.
    """
    if not _has_counts(record):
        return
    for gap_s, count in zip(gaps_of(record), record.token_counts[1:], strict=True):
        for _ in range(count):
            yield gap_s / count


def _has_counts(record: RequestRecord) -> bool:
    return len(record.token_counts) == len(record.token_times_s)


def fluidity_of(record: RequestRecord, objective: Objective) -> float | None:
    """The share of token deadlines that were met, as a player with a buffer would (Etalon 2024).

    The first token is due at the TTFT deadline, each later one a TPOT after the deadline of the one
    before it, so early tokens save up. A late one misses as many deadlines as fit into its
    lateness, and the deadlines start anew from it.
    """
    tpot_s = objective.tpot_s
    if objective.ttft is None or not tpot_s or not record.token_times_s:
        return None
    times = record.token_times_s
    counts = record.token_counts if _has_counts(record) else (1,) * len(times)
    due_s = record.intended_s + objective.ttft.at(record.num_prompt_tokens)
    num_met = num_missed = 0
    for time_s, count in zip(times, counts, strict=True):
        for _ in range(count):
            if time_s <= due_s:
                num_met += 1
                due_s += tpot_s
            else:
                num_missed += math.floor((time_s - due_s) / tpot_s) + 1
                due_s = time_s + tpot_s
    return num_met / (num_met + num_missed)


# ---- many requests -----------------------------------------------------------------------------


def _metrics(records: Sequence[RequestRecord], slo: Slo | None) -> dict[str, Distribution]:
    begun = [record for record in records if record.token_times_s]
    done = [record for record in records if record.outcome == OK]
    failed = [record for record in records if record.outcome not in (OK, CANCELLED)]
    num_tokenless = sum(not record.token_times_s for record in failed)
    sent = [record for record in records if record.outcome != "unsent"]
    found = {
        "ttft_s": distribution(_each(begun, ttft_of), num_failed=num_tokenless),
        "ttft_sent_s": distribution(_each(begun, ttft_sent_of), num_failed=num_tokenless),
        "tpot_s": distribution(_each(done, tpot_of)),
        "itl_s": distribution([itl for record in begun for itl in itls_of(record)]),
        "icl_s": distribution([gap for record in begun for gap in gaps_of(record)]),
        "max_gap_s": distribution([max(gaps) for gaps in map(gaps_of, begun) if gaps]),
        "e2e_s": distribution(_each(done, e2e_of), num_failed=len(failed)),
        "normalized_s": distribution(_each(done, _normalized_of)),
        "send_lag_s": distribution([record.sent_s - record.intended_s for record in sent]),
    }
    if slo is not None:
        found["fluidity"] = distribution(
            _each(begun, lambda record: fluidity_of(record, slo.of(record.kind))), is_good=True
        )
    return {name: values for name, values in found.items() if values.count or values.num_failed}


def _normalized_of(record: RequestRecord) -> float | None:
    e2e_s = e2e_of(record)
    return e2e_s / record.num_output_tokens if e2e_s and record.num_output_tokens else None


def _each(
    records: Sequence[RequestRecord], metric: Callable[[RequestRecord], float | None]
) -> list[float]:
    return [value for value in map(metric, records) if value is not None]


def distribution(
    values: Sequence[float], *, num_failed: int = 0, is_good: bool = False
) -> Distribution:
    """Mean and percentiles of values in order of time, each percentile with its interval.

    Args:
        num_failed: how many more there would be, all larger, had nothing failed.
        is_good: large values are the good ones: a percentile is what that share reaches.
    """
    sign = -1.0 if is_good else 1.0
    num = len(values) + num_failed
    series = [sign * value for value in values] + [math.inf] * num_failed
    ordered = sorted(series)
    points: dict[str, float | None] = dict.fromkeys(QUANTILES)
    interval: dict[str, tuple[float, float]] = {}
    refused: dict[str, str] = {}
    for name, q in QUANTILES.items():
        if num < min_samples(q):
            refused[name] = f"n too small: {num} of {min_samples(q)}"
        elif math.isinf(value := percentile(ordered, q)):
            refused[name] = f"{num_failed} of {num} failed before"
        else:
            points[name] = sign * value
            low, high = percentile_interval(series, q)
            interval[name] = (low, high) if not is_good else (-high, -low)
    mean = math.fsum(values) / len(values) if values else None
    return Distribution(
        len(values),
        mean,
        points["p50"],
        points["p90"],
        points["p99"],
        interval,
        refused,
        num_failed,
    )


def _throughput(records: Sequence[RequestRecord], slo: Slo | None) -> Throughput:
    if not records:
        return Throughput(0.0, 0.0, 0.0, None if slo is None else 0.0, 0.0, 0.0)
    done = [record for record in records if record.outcome == OK]
    first_s = min(record.intended_s for record in records)
    last_intended_s = max(record.intended_s for record in records)
    ends = [record.finished_s for record in records if record.finished_s is not None]
    span_s = max([last_intended_s, *ends]) - first_s
    per_s = 1 / span_s if span_s else 0.0
    intended_s = last_intended_s - first_s
    good = None if slo is None else sum(slo.of(record.kind).met(record) for record in done)
    return Throughput(
        span_s,
        (len(records) - 1) / intended_s if intended_s else 0.0,
        len(done) * per_s,
        None if good is None else good * per_s,
        sum(record.num_prompt_tokens for record in done) * per_s,
        sum(record.num_output_tokens for record in records) * per_s,
        _cached_share(done),
    )


def _cached_share(records: Sequence[RequestRecord]) -> float | None:
    told = [(r.num_cached_tokens, r.num_prompt_tokens) for r in records if r.num_prompt_tokens]
    known = [(cached, num) for cached, num in told if cached is not None]
    return sum(cached for cached, _ in known) / sum(num for _, num in known) if known else None


def littles_law_error(
    records: Sequence[RequestRecord], mean_in_flight: float, span_s: float
) -> float | None:
    """``|L - lambda W| / L``: L as the driver counted it while it ran, the rest from the records.

    More than 5 % means lost records or a bad clock. None when nothing happened.

    Args:
        span_s: how long the driver counted.
    """
    spent_s = sum(r.finished_s - r.sent_s for r in records if r.finished_s is not None)
    if span_s <= 0 or mean_in_flight <= 0:
        return None
    return abs(mean_in_flight - spent_s / span_s) / mean_in_flight
