"""What ``/metrics`` says can be read by whoever reads such pages, and is true."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from coordinator.config import CoordinatorConfig, ExpectedPool
from coordinator.http.connections.kept import Connections
from coordinator.http.metrics import RANK_FIGURES, render
from coordinator.loop.lag import LoopLag
from coordinator.node import CoordinatorNode
from coordinator.request import Request
from coordinator.requests.metrics import RequestMetrics
from protocol.messages import BlockCounts
from protocol.request import SamplingParams
from protocol.timeline import TimelineEvent
from protocol.token_ids import TokenIds

EDGES = ("0.01", "0.025", "0.5", "+Inf")
BIG = 2**53 - 1  # a counter of bytes has more than six digits


def pool(pool_id: str, counters: dict[str, float]) -> Any:
    heartbeat = SimpleNamespace(
        counters=counters,
        blocks=(BlockCounts(total=8, free=4, owned=2, in_flight=1, cached=1),) * 2,
    )
    return SimpleNamespace(
        pool_id=pool_id, is_serving=True, ranks={0: SimpleNamespace(heartbeat=heartbeat)}
    )


def ended(outcome: str, first_token_s: float) -> Request:
    request = Request(
        request_id="r",
        prompt_token_ids=TokenIds.of((1, 2, 3)),
        sampling=SamplingParams(max_tokens=1),
        tenant="tenant",
        error_code=outcome,
    )
    request.timeline.mark(TimelineEvent.ARRIVED, 1.0)
    request.timeline.mark(TimelineEvent.FIRST_TOKEN, 1.0 + first_token_s)
    return request


def page(accept: str = "") -> tuple[str, str]:
    metrics = RequestMetrics()
    for outcome, first_token_s in (("x", 0.02), ("x", 0.3), ('odd "name"\n\\', 1e9)):
        metrics.observe(ended(outcome, first_token_s))
    stored = dict.fromkeys(RANK_FIGURES, float(BIG))
    pools = [pool("prefill0", {}), pool("store0", stored), pool("store1", stored)]
    config = CoordinatorConfig("t", "arithmetic", (ExpectedPool("d", "decode", 1, 1),))
    frontend: Any = SimpleNamespace(
        metrics=metrics,
        service=CoordinatorNode(config, "model", epoch=1).service,
        registry=SimpleNamespace(pools={pool.pool_id: pool for pool in pools}),
        lag=LoopLag(),
        bodies=SimpleNamespace(num_bytes=0),
        workers=SimpleNamespace(num_waiting=0, counters=Counter(done=3)),
        connections=Connections(8),
        jobs=SimpleNamespace(gate=SimpleNamespace(num_set_aside=0, held_s=0.0, num_deaths=0)),
    )
    body, content_type = render(frontend, accept)
    return body.decode(), content_type


@pytest.mark.parametrize(
    ("accept", "parse", "kind"),
    [
        ("", parse_text, "text/plain"),
        ("application/openmetrics-text; version=1.0.0", parse_openmetrics, "openmetrics"),
    ],
)
def test_both_formats_are_whole(accept: str, parse: Any, kind: str) -> None:
    text, content_type = page(accept)
    assert kind in content_type
    families = list(parse(text))
    names = Counter(family.name for family in families)
    assert max(names.values()) == 1, "the samples of a family stand together"
    assert all(family.documentation and family.type != "unknown" for family in families)
    samples = {
        (s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples
    }
    assert samples["baton_store_written_bytes_total", ("pool", "store1")] == BIG
    assert samples["baton_requests_total", ("outcome", 'odd "name"\n\\')] == 1
    buckets = {le: samples["baton_time_to_first_token_seconds_bucket", ("le", le)] for le in EDGES}
    assert buckets == {"0.01": 0, "0.025": 1, "0.5": 2, "+Inf": 3}, "cumulative"
    assert samples["baton_time_to_first_token_seconds_count",] == 3
    assert not any(name.endswith("_created") for name, *_ in samples)
