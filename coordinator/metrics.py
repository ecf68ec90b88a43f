"""The figures of ``/metrics``, made from the ends and time lines of requests.

The exposition formats are prometheus_client's; what it renders are *families* (one name, one type,
one help text, all samples together), built anew for each scrape. Its own Counter and Histogram
objects are not used: they lock, and add ``_created`` series that nobody asked for.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from coordinator.bodies import Budget
from coordinator.connections import Connections
from coordinator.jobs.gate import Gate
from coordinator.lag import LoopLag
from coordinator.pools import Pool
from coordinator.records import Record
from coordinator.text.workers import TextWorkers
from protocol.logs import LOG_LINES_DROPPED
from protocol.request import FinishReason
from protocol.timeline import Event

BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
BLOCK_STATES = ("total", "free", "owned", "in_flight", "quarantined", "cached")


class _RankFigure(NamedTuple):
    """A counter of a leader's heartbeat that is exported."""

    name: str  # of the family, without its suffix
    is_counter: bool
    help: str


RANK_FIGURES = {
    "store_disk_bytes": _RankFigure("store_disk_bytes", False, "Bytes of packs on disk"),
    "store_disk_quota_bytes": _RankFigure(
        "store_disk_quota_bytes", False, "Bytes that packs may take on disk"
    ),
    "store_packs": _RankFigure("store_packs", False, "Packs on disk"),
    "store_packs_evicted": _RankFigure("store_packs_evicted", True, "Packs given up for room"),
    "store_packs_damaged": _RankFigure("store_packs_damaged", True, "Packs found damaged"),
    "store_written_bytes": _RankFigure("store_written_bytes", True, "Bytes written to packs"),
    "store_loaded_blocks": _RankFigure("store_loaded_blocks", True, "Blocks read from packs"),
    "store_lent_blocks": _RankFigure("store_lent_blocks", True, "Blocks handed to other pools"),
}


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

    def families(self) -> Iterator[Metric]:
        """Everything that was counted."""
        yield _counters("requests", "Requests that have ended", "outcome", self._outcomes)
        yield _counters(
            "attempts_lost", "Attempts of requests that were lost", "reason", self._lost_attempts
        )
        yield _counter(
            "requests_quarantined",
            "Requests refused since pools died of them",
            self.num_quarantined,
        )
        yield _counters(
            "non_finite_logits",
            "Requests whose logits were not finite, by the pool that made them",
            "pool",
            self.num_non_finite,
        )
        yield _counters("prompt_tokens", "Prompt tokens", "kind", self._num_prompt_tokens)
        yield _counter("output_tokens", "Tokens delivered to callers", self.num_output_tokens)
        yield self._first_token.family(
            "baton_time_to_first_token_seconds", "From a request's arrival to its first token"
        )
        yield self._total.family("baton_request_seconds", "From a request's arrival to its end")
        yield self._exposed_transfer.family(
            "baton_exposed_transfer_seconds", "Moving of KV that no computation hid"
        )


def request_families(num_active: int, num_leaked: int) -> Iterator[Metric]:
    """How many requests there are."""
    yield _gauge("requests_active", "Requests that have not ended", num_active)
    yield _gauge("requests_leaked", "Ended requests that a pool still holds blocks of", num_leaked)


def lag_families(lag: LoopLag, now: float) -> Iterator[Metric]:
    """How late the event loop runs."""
    yield _gauge(
        "coordinator_loop_lag_seconds", "Largest lag of the event loop of late", lag.largest(now)
    )
    yield _gauge(
        "coordinator_loop_step_seconds",
        "Largest such lag, less what its thread has waited for a core",
        lag.longest_step_s(now),
    )
    yield _counter("coordinator_loop_stalls", "Times that the event loop was late", lag.num_stalls)


def text_families(workers: TextWorkers, bodies: Budget) -> Iterator[Metric]:
    """What is read of requests, and by whom."""
    yield _gauge("body_bytes", "Bytes of bodies that are being received or read", bodies.num_bytes)
    yield _gauge("texts_waiting", "Requests that wait for a text worker", workers.num_waiting)
    yield _counter("texts", "Requests that text workers have read", workers.counters["done"])
    family = CounterMetricFamily(
        "baton_text_workers_lost", "Text workers that have ended in a task", labels=["reason"]
    )
    for reason in ("late", "crashed", "worn", "starting"):
        family.add_metric([reason], workers.counters[f"lost_{reason}"])
    yield family


def connection_families(connections: Connections[Any]) -> Iterator[Metric]:
    """How many callers are connected, and what was done about too many."""
    yield _gauge("connections_open", "Open HTTP connections", len(connections))
    yield _gauge("connections_max", "HTTP connections that may be open", connections.max_open)
    yield _counter(
        "connections_refused", "Refused, since all were at work", connections.num_refused
    )
    yield _counter(
        "connections_closed_idle", "Closed to make room for others", connections.num_closed_idle
    )
    yield _counter(
        "accept_errors", "Times that the system had no connection", connections.num_accept_errors
    )


def log_families(num_dropped: int, pools: Iterable[Pool]) -> Iterator[Metric]:
    """Lines that the coordinator and the ranks have said and nobody will see."""
    family = CounterMetricFamily(
        "baton_log_lines_dropped", "Log lines that were not written", labels=["process"]
    )
    family.add_metric(["coordinator"], num_dropped)
    for pool in pools:
        for number, rank in sorted(pool.ranks.items()):
            if rank.heartbeat is not None:
                count = rank.heartbeat.counters.get(LOG_LINES_DROPPED, 0)
                family.add_metric([f"{pool.pool_id}/{number}"], count)
    yield family


def job_families(gate: Gate) -> Iterator[Metric]:
    """Documents and batches that this process has died of."""
    yield _gauge("jobs_set_aside", "Jobs that wait to be tried again by hand", gate.num_set_aside)
    yield _gauge("jobs_held_seconds", "Time until jobs are begun again", gate.held_s)
    yield _counter(
        "jobs_deaths", "Earlier coordinators that died with jobs in work", gate.num_deaths
    )


def pool_families(pools: Iterable[Pool]) -> Iterator[Metric]:
    """How the pools are, and what their leaders count."""
    pools = list(pools)
    serving = GaugeMetricFamily("baton_pool_serving", "Whether a pool serves", labels=["pool"])
    blocks = GaugeMetricFamily(
        "baton_blocks", "KV blocks of a pool by their state", labels=["pool", "space", "state"]
    )
    figures = {name: _labelled(figure) for name, figure in RANK_FIGURES.items()}
    for pool in pools:
        serving.add_metric([pool.pool_id], int(pool.is_serving))
        heartbeat = pool.ranks[0].heartbeat if 0 in pool.ranks else None
        if heartbeat is None:
            continue
        for space, counts in enumerate(heartbeat.blocks):
            for state in BLOCK_STATES:
                blocks.add_metric([pool.pool_id, str(space), state], getattr(counts, state))
        for name, family in figures.items():
            if name in heartbeat.counters:
                family.add_metric([pool.pool_id], heartbeat.counters[name])
    yield serving
    yield blocks
    yield from (family for family in figures.values() if family.samples)


def render(families: Iterable[Metric], accept: str = "") -> tuple[bytes, str]:
    """(body, content type) in the format that a scraper asks for by its Accept header."""
    encode, content_type = choose_encoder(accept)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(list(families)))
    return encode(registry), content_type


class _Collected(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"baton_{name}", help_text, value=value)


def _counter(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(f"baton_{name}", help_text, value=value)


def _counters(name: str, help_text: str, label: str, counts: Counter[str]) -> Metric:
    family = CounterMetricFamily(f"baton_{name}", help_text, labels=[label])
    for value, count in sorted(counts.items()):
        family.add_metric([value], count)
    return family


def _labelled(figure: _RankFigure) -> Any:  # noqa: ANN401 - both kinds have the same add_metric
    kind = CounterMetricFamily if figure.is_counter else GaugeMetricFamily
    return kind(f"baton_{figure.name}", figure.help, labels=["pool"])
