"""Counters in Prometheus's text format, made from the ends and time lines of requests."""

from collections import Counter
from collections.abc import Iterable

from coordinator.lag import LoopLag
from coordinator.records import Record
from coordinator.registry import Pool
from protocol.request import FinishReason
from protocol.timeline import Event

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
BLOCK_STATES = ("total", "free", "owned", "in_flight", "quarantined", "cached")


class Histogram:
    """Cumulative buckets, a sum and a count."""

    def __init__(self, bounds: tuple[float, ...] = BUCKETS_S) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._sum += value
        slot = next((i for i, b in enumerate(self._bounds) if value <= b), len(self._bounds))
        self._counts[slot] += 1

    def lines(self, name: str) -> list[str]:
        lines, total = [f"# TYPE {name} histogram"], 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._sum:.6f}", f"{name}_count {total}"]


class Metrics:
    """What has happened since the start."""

    def __init__(self) -> None:
        self.num_output_tokens = 0
        self.num_quarantined = 0
        self._lost_attempts: Counter[str] = Counter()
        self._num_prompt_tokens: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._first_token = Histogram()
        self._exposed_transfer = Histogram()
        self._total = Histogram()

    def observe(self, record: Record) -> None:
        """Count a request that has just ended; deposits only by how they end."""
        ended = "stored" if record.is_deposit else record.finish_reason or FinishReason.ERROR
        outcome = record.error_code or str(ended)
        self._outcomes[outcome] += 1
        self._lost_attempts.update(ended.reason for ended in record.lost)
        if record.is_deposit:
            return
        self._num_prompt_tokens["cached"] += record.num_cached_tokens
        self._num_prompt_tokens["computed"] += record.num_computed_tokens or 0
        first = record.timeline.between(Event.ARRIVED, Event.FIRST_TOKEN)
        if first is not None:
            self._first_token.observe(first)
        total = record.timeline.between(Event.ARRIVED, Event.FINISHED)
        if total is not None:
            self._total.observe(total)
        if record.stats is not None:
            self._exposed_transfer.observe(record.stats.exposed_s)

    def render(self, pools: Iterable[Pool], num_active: int, num_leaked: int) -> str:
        """Everything, as text."""
        lines = ["# TYPE baton_requests_total counter"]
        lines += [
            f'baton_requests_total{{outcome="{outcome}"}} {count}'
            for outcome, count in sorted(self._outcomes.items())
        ]
        lines.append("# TYPE baton_attempts_lost_total counter")
        lines += [
            f'baton_attempts_lost_total{{reason="{reason}"}} {count}'
            for reason, count in sorted(self._lost_attempts.items())
        ]
        lines.append("# TYPE baton_requests_quarantined_total counter")
        lines.append(f"baton_requests_quarantined_total {self.num_quarantined}")
        lines.append("# TYPE baton_prompt_tokens_total counter")
        lines += [
            f'baton_prompt_tokens_total{{kind="{kind}"}} {count}'
            for kind, count in sorted(self._num_prompt_tokens.items())
        ]
        lines.append("# TYPE baton_output_tokens_total counter")
        lines.append(f"baton_output_tokens_total {self.num_output_tokens}")
        lines += ["# TYPE baton_requests_active gauge", f"baton_requests_active {num_active}"]
        lines += ["# TYPE baton_requests_leaked gauge", f"baton_requests_leaked {num_leaked}"]
        lines += self._first_token.lines("baton_time_to_first_token_seconds")
        lines += self._total.lines("baton_request_seconds")
        lines += self._exposed_transfer.lines("baton_exposed_transfer_seconds")
        lines += ["# TYPE baton_pool_serving gauge", "# TYPE baton_blocks gauge"]
        for pool in pools:
            lines += _pool_lines(pool)
        return "\n".join(lines) + "\n"


def render_lag(lag: LoopLag, now: float) -> str:
    """How late the event loop runs, as text."""
    name, count = "baton_coordinator_loop_lag_seconds", "baton_coordinator_loop_stalls_total"
    return (
        f"# TYPE {name} gauge\n{name} {lag.largest(now):.6f}\n"
        f"# TYPE {count} counter\n{count} {lag.num_stalls}\n"
    )


def _pool_lines(pool: Pool) -> list[str]:
    lines = [f'baton_pool_serving{{pool="{pool.pool_id}"}} {int(pool.is_serving)}']
    heartbeat = pool.ranks[0].heartbeat if 0 in pool.ranks else None
    if heartbeat is None:
        return lines
    lines += [
        f'baton_{name}{{pool="{pool.pool_id}"}} {value:g}'
        for name, value in sorted(heartbeat.counters.items())
        if name.startswith("store_")
    ]
    for space, counts in enumerate(heartbeat.blocks):
        lines += [
            f'baton_blocks{{pool="{pool.pool_id}",space="{space}",state="{state}"}} '
            f"{getattr(counts, state)}"
            for state in BLOCK_STATES
        ]
    return lines
