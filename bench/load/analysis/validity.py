"""Whether a run may be believed: the driver judges itself before anybody judges the server."""

from collections.abc import Sequence

import msgspec

from bench.load.analysis.intervals import percentile
from bench.load.analysis.metrics import littles_law_error, ttft_sent_of
from bench.load.analysis.slo import Slo
from bench.load.record import OK, RequestRecord

CPU_WINDOW_S = 5.0
MAX_CPU_SHARE = 0.8
MAX_LAG_SHARE = 0.05
MIN_LAG_LIMIT_S = 0.005
MAX_LITTLE_ERROR = 0.05

STOPPED = "it was stopped before its end"
NO_SUCCESS = "not one request succeeded"
NOT_THE_DRIVERS = frozenset((STOPPED, NO_SUCCESS))
"""Reasons that say nothing against the driver."""


class Audit(msgspec.Struct, frozen=True):
    """What a driver's process knows of itself after a run."""

    span_s: float
    cpu_share: float
    """The largest share of a core over any ``CPU_WINDOW_S``."""
    loop_lag_s: float
    """p99 of how late its event loop woke up: so late may it have seen tokens."""
    mean_in_flight: float
    num_connections: int
    is_stopped: bool


def invalid_reasons(
    records: Sequence[RequestRecord], audits: Sequence[Audit], num_planned: int, slo: Slo | None
) -> list[str]:
    """Why these records prove nothing; none is a valid run.

    Args:
        num_planned: records that there must be.
    """
    reasons: list[str] = []
    lag, limit = send_lag(records), lag_limit_s(records, slo)
    if lag["p99"] > limit:
        reasons.append(
            f"the driver was late: p99 of send lag {lag['p99'] * 1e3:.1f} ms, over "
            f"{limit * 1e3:.1f} ms; use more processes or a quieter machine"
        )
    loop_lag_s = max((audit.loop_lag_s for audit in audits), default=0.0)
    if loop_lag_s > limit:
        reasons.append(
            f"the driver was not looking: p99 of its event loop's lag {loop_lag_s * 1e3:.1f} ms, "
            f"over {limit * 1e3:.1f} ms; use more processes or a quieter machine"
        )
    busiest = max((audit.cpu_share for audit in audits), default=0.0)
    if busiest > MAX_CPU_SHARE:
        reasons.append(
            f"a driver process used {busiest:.0%} of its core, over {MAX_CPU_SHARE:.0%}; "
            "use more processes"
        )
    span_s = max((audit.span_s for audit in audits), default=0.0)
    seconds = sum(audit.mean_in_flight * audit.span_s for audit in audits)
    error = littles_law_error(records, seconds / span_s if span_s else 0.0, span_s)
    if error is not None and error > MAX_LITTLE_ERROR:
        reasons.append(f"Little's law fails by {error:.0%}: records are missing or a clock is bad")
    if len(records) != num_planned:
        reasons.append(f"{len(records)} records of {num_planned} requests")
    if not any(record.outcome == OK for record in records):
        reasons.append(NO_SUCCESS)
    if any(audit.is_stopped for audit in audits):
        reasons.append(STOPPED)
    return reasons


def send_lag(records: Sequence[RequestRecord]) -> dict[str, float]:
    """p50, p99 and the largest, of what was sent. No sample is too small to judge ourselves by."""
    lags = sorted(r.sent_s - r.intended_s for r in records if r.outcome != "unsent")
    if not lags:
        return {"p50": 0.0, "p99": 0.0, "max": 0.0}
    return {"p50": percentile(lags, 0.5), "p99": percentile(lags, 0.99), "max": lags[-1]}


def lag_limit_s(records: Sequence[RequestRecord], slo: Slo | None) -> float:
    """What p99 of the send lag may be."""
    tightest_s = slo.tightest_s if slo is not None else None
    if tightest_s is not None:
        return MAX_LAG_SHARE * tightest_s
    ttfts = sorted(ttft for record in records if (ttft := ttft_sent_of(record)) is not None)
    median_s = ttfts[len(ttfts) // 2] if ttfts else 0.0
    return max(MIN_LAG_LIMIT_S, MAX_LAG_SHARE * median_s)


def largest_share(samples: Sequence[tuple[float, float]], window_s: float) -> float:
    """The largest CPU time over wall time of any window, of (wall, CPU) samples in order.

    Over the whole where it is shorter than a window.
    """
    largest, first = 0.0, 0
    for wall, cpu in samples:
        while first + 1 < len(samples) and wall - samples[first + 1][0] >= window_s:
            first += 1
        elapsed_s = wall - samples[first][0]
        if elapsed_s >= window_s:
            largest = max(largest, (cpu - samples[first][1]) / elapsed_s)
    if not largest and len(samples) > 1:
        elapsed_s = samples[-1][0] - samples[0][0]
        largest = (samples[-1][1] - samples[0][1]) / elapsed_s if elapsed_s > 0 else 0.0
    return largest
