"""The figures of ``/metrics``, made from the ends and time lines of requests.

The exposition formats are prometheus_client's; what it renders are *families* (one name, one type,
one help text, all samples together), built anew for each scrape. Its own Counter and Histogram
objects are not used: they lock, and add ``_created`` series that nobody asked for.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from coordinator.cluster.pools import Pool
from coordinator.http.connections.kept import Connections
from coordinator.jobs.engine.gate import Gate
from coordinator.loop.lag import LoopLag
from coordinator.requests.metrics import counter_family
from coordinator.text.workers import TextWorkers
from coordinator.validation.bodies import Budget
from protocol.logs import LOG_LINES_DROPPED

BLOCK_STATES = ("total", "free", "owned", "in_flight", "cached")


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
    yield counter_family(
        "coordinator_loop_stalls", "Times that the event loop was late", lag.num_stalls
    )


def text_families(workers: TextWorkers, bodies: Budget) -> Iterator[Metric]:
    """What is read of requests, and by whom."""
    yield _gauge("body_bytes", "Bytes of bodies that are being received or read", bodies.num_bytes)
    yield _gauge("texts_waiting", "Requests that wait for a text worker", workers.num_waiting)
    yield counter_family("texts", "Requests that text workers have read", workers.counters["done"])
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
    yield counter_family(
        "connections_refused", "Refused, since all were at work", connections.num_refused
    )
    yield counter_family(
        "connections_closed_idle", "Closed to make room for others", connections.num_closed_idle
    )
    yield counter_family(
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
    yield counter_family(
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


def _labelled(figure: _RankFigure) -> Any:  # noqa: ANN401 - both kinds have the same add_metric
    kind = CounterMetricFamily if figure.is_counter else GaugeMetricFamily
    return kind(f"baton_{figure.name}", figure.help, labels=["pool"])
