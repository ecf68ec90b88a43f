"""What has become of requests since the start, in prometheus_client's own counters.

They lock, so nothing of them is touched for each token: each request is counted as it ends.
"""

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics

from coordinator.request import Request
from protocol.request import FinishReason
from protocol.timeline import TimelineEvent

BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class RequestMetrics:
    """What has become of requests since the start."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # series that nobody asked for
        self.num_output_tokens = 0  # delivered to callers
        self.registry = registry = CollectorRegistry(auto_describe=False)

        def counter(name: str, text: str, label: str) -> Counter:
            return Counter(f"baton_{name}", text, [label], registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            name = f"baton_{name}_seconds"
            return Histogram(name, text, buckets=BUCKETS_S, registry=registry)

        self._ended = counter("requests", "Requests that have ended", "outcome")
        self._lost = counter("attempts_lost", "Attempts of requests that were lost", "reason")
        prompt_tokens = counter("prompt_tokens", "Prompt tokens", "kind")
        self._cached, self._computed = map(prompt_tokens.labels, ("cached", "computed"))
        self._first_token = seconds(
            "time_to_first_token", "From a request's arrival to its first token"
        )
        self._total = seconds("request", "From a request's arrival to its end")
        self._exposed = seconds("exposed_transfer", "Moving of KV that no computation hid")

    def observe(self, request: Request) -> None:
        """Count a request that has just ended; offloads only by how they end."""
        ended = "stored" if request.is_offload else request.finish_reason or FinishReason.ERROR
        self._ended.labels(request.error_code or str(ended)).inc()
        for attempt in request.lost:
            self._lost.labels(attempt.reason).inc()
        if request.is_offload:
            return
        self._cached.inc(request.num_cached_tokens)
        self._computed.inc(request.num_computed_tokens or 0)
        for histogram, event in (
            (self._first_token, TimelineEvent.FIRST_TOKEN),
            (self._total, TimelineEvent.FINISHED),
        ):
            seconds = request.timeline.between(TimelineEvent.ARRIVED, event)
            if seconds is not None:
                histogram.observe(seconds)
        if request.stats is not None:
            self._exposed.observe(request.stats.exposed_s)
