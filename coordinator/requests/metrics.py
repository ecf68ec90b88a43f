"""What has happened to requests since the start, counted as each of them ends."""

from collections import Counter
from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

from coordinator.request import Request
from protocol.request import FinishReason
from protocol.timeline import TimelineEvent

BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Counts by bucket, and a sum."""

    def __init__(self, bounds: tuple[float, ...] = BUCKETS_S) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._sum += value
        slot = next((i for i, b in enumerate(self._bounds) if value <= b), len(self._bounds))
        self._counts[slot] += 1

    def family(self, name: str, help_text: str) -> Metric:
        """As Prometheus has it: cumulative."""
        buckets, total = [], 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((str(bound), total))
        return HistogramMetricFamily(name, help_text, buckets=buckets, sum_value=self._sum)


class Metrics:
    """What has happened since the start."""

    def __init__(self) -> None:
        self.num_output_tokens = 0  # delivered to callers
        self.num_quarantined = 0
        self.num_non_finite: Counter[str] = Counter()  # requests, by pool
        self._lost_attempts: Counter[str] = Counter()
        self._num_prompt_tokens: Counter[str] = Counter(cached=0, computed=0)
        self._outcomes: Counter[str] = Counter()
        self._first_token = Histogram()
        self._exposed_transfer = Histogram()
        self._total = Histogram()

    def observe(self, request: Request) -> None:
        """Count a request that has just ended; offloads only by how they end."""
        ended = "stored" if request.is_offload else request.finish_reason or FinishReason.ERROR
        outcome = request.error_code or str(ended)
        self._outcomes[outcome] += 1
        self._lost_attempts.update(ended.reason for ended in request.lost)
        if request.is_offload:
            return
        self._num_prompt_tokens["cached"] += request.num_cached_tokens
        self._num_prompt_tokens["computed"] += request.num_computed_tokens or 0
        first = request.timeline.between(TimelineEvent.ARRIVED, TimelineEvent.FIRST_TOKEN)
        if first is not None:
            self._first_token.observe(first)
        total = request.timeline.between(TimelineEvent.ARRIVED, TimelineEvent.FINISHED)
        if total is not None:
            self._total.observe(total)
        if request.stats is not None:
            self._exposed_transfer.observe(request.stats.exposed_s)

    def families(self) -> Iterator[Metric]:
        """Everything that was counted."""
        yield counters_family("requests", "Requests that have ended", "outcome", self._outcomes)
        yield counters_family(
            "attempts_lost", "Attempts of requests that were lost", "reason", self._lost_attempts
        )
        yield counter_family(
            "requests_quarantined",
            "Requests refused since pools died of them",
            self.num_quarantined,
        )
        yield counters_family(
            "non_finite_logits",
            "Requests whose logits were not finite, by the pool that made them",
            "pool",
            self.num_non_finite,
        )
        yield counters_family("prompt_tokens", "Prompt tokens", "kind", self._num_prompt_tokens)
        yield counter_family("output_tokens", "Tokens delivered to callers", self.num_output_tokens)
        yield self._first_token.family(
            "baton_time_to_first_token_seconds", "From a request's arrival to its first token"
        )
        yield self._total.family("baton_request_seconds", "From a request's arrival to its end")
        yield self._exposed_transfer.family(
            "baton_exposed_transfer_seconds", "Moving of KV that no computation hid"
        )


def counter_family(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(f"baton_{name}", help_text, value=value)


def counters_family(name: str, help_text: str, label: str, counts: Counter[str]) -> Metric:
    family = CounterMetricFamily(f"baton_{name}", help_text, labels=[label])
    for value, count in sorted(counts.items()):
        family.add_metric([value], count)
    return family
