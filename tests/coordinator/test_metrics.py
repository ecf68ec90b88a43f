"""What ``/metrics`` says can be read by whoever reads such pages, and is true."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from coordinator.http.metrics import (
    RANK_FIGURES,
    lag_families,
    pool_families,
    render,
    request_families,
)
from coordinator.loop.lag import LoopLag
from coordinator.requests.metrics import Histogram, Metrics
from protocol.messages import BlockCounts

BIG = 2**53 - 1  # a counter of bytes has more than six digits


def pool(pool_id: str, counters: dict[str, float]) -> Any:
    heartbeat = SimpleNamespace(
        counters=counters,
        blocks=(BlockCounts(total=8, free=4, owned=2, in_flight=1, cached=1),) * 2,
    )
    return SimpleNamespace(
        pool_id=pool_id, is_serving=True, ranks={0: SimpleNamespace(heartbeat=heartbeat)}
    )


def page(accept: str = "") -> tuple[str, str]:
    metrics = Metrics()
    metrics._outcomes.update({"length": 2, 'odd "name"\n\\': 1})
    metrics._first_token.observe(0.02)
    metrics._first_token.observe(1e9)
    stored = dict.fromkeys(RANK_FIGURES, float(BIG))
    pools = [pool("prefill0", {}), pool("store0", stored), pool("store1", stored)]
    body, content_type = render(
        (
            *metrics.families(),
            *request_families(3, 0),
            *lag_families(LoopLag(), 0.0),
            *pool_families(pools),
        ),
        accept,
    )
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
    assert samples["baton_time_to_first_token_seconds_bucket", ("le", "+Inf")] == 2
    assert samples["baton_time_to_first_token_seconds_count",] == 2
    assert not any(name.endswith("_created") for name, *_ in samples)


def test_a_histogram_is_cumulative() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 99.0):
        histogram.observe(value)
    buckets = [s.value for s in histogram.family("seconds", "Some").samples if "le" in s.labels]
    assert buckets == [2, 3, 4]
