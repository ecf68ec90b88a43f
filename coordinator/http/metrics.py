"""``/metrics``, in prometheus_client's formats.

What becomes of requests is counted as each of them ends (requests/metrics.py); what is so at the
moment, or is counted elsewhere, is read at each scrape.
"""

import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from coordinator.cluster.pools import Pool
from coordinator.http.frontend import Frontend
from protocol.process.logs import LOG_LINES_DROPPED, num_dropped_lines

BLOCK_STATES = ("total", "free", "owned", "in_flight", "cached")
COUNTER, GAUGE = CounterMetricFamily, GaugeMetricFamily
Kind = type[CounterMetricFamily] | type[GaugeMetricFamily]

# Counters of a leader's heartbeat that are shown under the same name, by pool.
RANK_FIGURES: dict[str, tuple[Kind, str]] = {
    "store_disk_bytes": (GAUGE, "Bytes of packs on disk"),
    "store_disk_quota_bytes": (GAUGE, "Bytes that packs may take on disk"),
    "store_packs": (GAUGE, "Packs on disk"),
    "store_packs_evicted": (COUNTER, "Packs given up for room"),
    "store_packs_damaged": (COUNTER, "Packs found damaged"),
    "store_written_bytes": (COUNTER, "Bytes written to packs"),
    "store_loaded_blocks": (COUNTER, "Blocks read from packs"),
    "store_lent_blocks": (COUNTER, "Blocks handed to other pools"),
}
FIGURES: tuple[tuple[str, Kind, str, Callable[[Frontend, float], float]], ...] = (
    ("requests_active", GAUGE, "Requests that have not ended",
     lambda f, _: f.service.loads.num_active),
    ("requests_leaked", GAUGE, "Ended requests that a pool still holds blocks of",
     lambda f, now: f.service.num_leaked(now)),
    ("requests_quarantined", COUNTER, "Requests refused since pools died of them",
     lambda f, _: f.service.num_quarantined),
    ("coordinator_loop_lag_seconds", GAUGE, "Largest lag of the event loop of late",
     lambda f, now: f.lag.largest(now)),
    ("coordinator_loop_step_seconds", GAUGE,
     "Largest such lag, less what its thread has waited for a core",
     lambda f, now: f.lag.longest_step_s(now)),
    ("coordinator_loop_stalls", COUNTER, "Times that the event loop was late",
     lambda f, _: f.lag.num_stalls),
    ("body_bytes", GAUGE, "Bytes of bodies that are being received or read",
     lambda f, _: f.bodies.num_bytes),
    ("texts_waiting", GAUGE, "Requests that wait for a text worker",
     lambda f, _: f.workers.num_waiting),
    ("texts", COUNTER, "Requests that text workers have read",
     lambda f, _: f.workers.counters["done"]),
    ("connections_open", GAUGE, "Open HTTP connections", lambda f, _: len(f.connections)),
    ("connections_max", GAUGE, "HTTP connections that may be open",
     lambda f, _: f.connections.max_open),
    ("connections_refused", COUNTER, "Refused, since all were at work",
     lambda f, _: f.connections.num_refused),
    ("connections_closed_idle", COUNTER, "Closed to make room for others",
     lambda f, _: f.connections.num_closed_idle),
    ("accept_errors", COUNTER, "Times that the system had no connection",
     lambda f, _: f.connections.num_accept_errors),
    ("jobs_set_aside", GAUGE, "Jobs that wait to be tried again by hand",
     lambda f, _: f.jobs.gate.num_set_aside),
    ("jobs_held_seconds", GAUGE, "Time until jobs are begun again",
     lambda f, _: f.jobs.gate.held_s),
    ("jobs_deaths", COUNTER, "Earlier coordinators that died with jobs in work",
     lambda f, _: f.jobs.gate.num_deaths),
)  # fmt: skip


def render(frontend: Frontend, accept: str) -> tuple[bytes, str]:
    """(body, content type) in the format that a scraper asks for by its Accept header."""
    encode, content_type = choose_encoder(accept)
    return encode(_Page(frontend)), content_type


class _Page(Collector):
    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    def collect(self) -> Iterable[Metric]:
        frontend, now = self._frontend, time.monotonic()
        yield from frontend.metrics.registry.collect()
        num_tokens = frontend.metrics.num_output_tokens
        yield COUNTER("baton_output_tokens", "Tokens delivered to callers", value=num_tokens)
        for name, kind, text, read in FIGURES:
            yield kind(f"baton_{name}", text, value=read(frontend, now))
        yield from _counted_elsewhere(frontend)
        yield from pool_families(frontend.registry.pools.values())


def _counted_elsewhere(frontend: Frontend) -> Iterator[Metric]:
    lost = COUNTER(
        "baton_text_workers_lost", "Text workers that have ended in a task", labels=["reason"]
    )
    for reason in ("late", "crashed", "worn", "starting"):
        lost.add_metric([reason], frontend.workers.counters[f"lost_{reason}"])
    flawed = COUNTER(
        "baton_non_finite_logits",
        "Requests whose logits were not finite, by the pool that made them",
        labels=["pool"],
    )
    for pool_id, count in sorted(frontend.service.num_non_finite.items()):
        flawed.add_metric([pool_id], count)
    dropped = COUNTER(
        "baton_log_lines_dropped", "Log lines that were not written", labels=["process"]
    )
    dropped.add_metric(["coordinator"], num_dropped_lines())
    for pool in frontend.registry.pools.values():
        for number, rank in sorted(pool.ranks.items()):
            if rank.heartbeat is not None:
                num_lines = rank.heartbeat.counters.get(LOG_LINES_DROPPED, 0)
                dropped.add_metric([f"{pool.pool_id}/{number}"], num_lines)
    yield from (lost, flawed, dropped)


def pool_families(pools: Iterable[Pool]) -> Iterator[Metric]:
    """How the pools are, and what their leaders count."""
    serving = GAUGE("baton_pool_serving", "Whether a pool serves", labels=["pool"])
    blocks = GAUGE(
        "baton_blocks", "KV blocks of a pool by their state", labels=["pool", "space", "state"]
    )
    figures = {
        name: kind(f"baton_{name}", text, labels=["pool"])
        for name, (kind, text) in RANK_FIGURES.items()
    }
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
