"""Made-up runs of two servers under the same schedule, drawn from a seed: no server is asked.

With the rate first tokens come later; the colocated server also stalls its answers now and then.
"""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from bench.load.record import FORMAT_VERSION, Manifest, RequestRecord
from bench.report.runs import Run
from tests.bench.records import record

DEADLINE = {"ttft_ms": {"base": 350, "per_1k_tokens": 120}, "tpot_ms": 30, "target": 0.9}
SLO = {"short": DEADLINE, "long": DEADLINE, "default": {"ttft_ms": 800, "target": 0.9}}
TARGETS = ("disaggregated", "colocated")


def _asked(random: Random, rate: float, duration_s: float) -> Iterator[dict[str, Any]]:
    """An open loop: mostly short prompts, some long, documents with three questions."""
    at_s, index = 0.0, 0
    while (at_s := at_s + random.expovariate(rate)) < duration_s:
        kind = random.choices(("short", "long", "document"), (0.9, 0.08, 0.02))[0]
        num_tokens = int(random.lognormvariate(6.2 if kind == "short" else 8.9, 0.6)) + 16
        for turn in range(4 if kind == "document" else 1):
            yield {
                "index": index,
                "session": f"session-{index - turn}",
                "turn": turn,
                "kind": "question" if turn else kind,
                "at_s": round(at_s + 2.5 * turn, 6),
                "num_prompt_tokens": num_tokens + 40 * turn,
                "num_cached_tokens": num_tokens if turn else 0,
                "max_tokens": random.randint(8, 48),
            }
            index += 1


def _answered(random: Random, asked: dict[str, Any], target: str, rate: float) -> RequestRecord:
    num_computed = asked["num_prompt_tokens"] - asked["num_cached_tokens"]
    ttft_s = 0.01 + 4e-5 * num_computed + random.expovariate(16 / rate**1.5)
    stall_s = 0.11 if target == "colocated" else 0.0
    gaps_s = tuple(
        0.016 * random.uniform(0.9, 1.2) + stall_s * (random.random() < 0.03)
        for _ in range(asked["max_tokens"] - 1)
    )
    return record(
        ttft_s=ttft_s,
        gaps_s=gaps_s,
        target=target,
        sent_s=asked["at_s"] + random.expovariate(1 / 0.0004),
        status=200,
        finish_reason="length",
        request_id=f"example-{asked['index']}",
        **asked,
    )


def sample_run(
    seed: int, rate: float, duration_s: float = 60.0
) -> tuple[Manifest, list[RequestRecord]]:
    """Both servers."""
    random = Random(f"{seed}/{rate}")
    asked = sorted(_asked(random, rate, duration_s), key=lambda one: one["at_s"])
    records = [_answered(random, one, target, rate) for target in TARGETS for one in asked]
    manifest = Manifest(
        version=FORMAT_VERSION,
        command="baton bench run",
        seed=seed,
        workload={"name": "example: short, long, documents with questions"},
        arrival={"name": "poisson", "rate": rate},
        targets=[
            {"name": name, "url": "example:", "model": "example", "num_accelerators": 4}
            for name in TARGETS
        ],
        slo=SLO,
        duration_s=duration_s,
        environment={"cpu": "none: these figures are made up"},
        started_at="2026-01-01T00:00:00Z",
        schedule_sha256="0" * 64,
        valid=False,
        invalid_reasons=["an example: no server was measured"],
        send_lag={"p50": 0.0003, "p99": 0.0018, "max": 0.004},
        metrics_version="1",
    )
    return manifest, records


def sample_runs(seed: int = 0, rates: tuple[float, ...] = (2, 6, 10, 14, 18)) -> list[Run]:
    """A sweep: one run per rate."""
    return [Run(Path(f"rate-{rate:g}"), *sample_run(seed, rate)) for rate in rates]
