"""Made-up runs of a disaggregated and a colocated server, drawn from a seed: no server is asked.

The two servers are queues: the disaggregated one prefills on its own pool and hands over, the
colocated one stalls the tokens of everybody while it prefills.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from bench.load.record import FORMAT_VERSION, Manifest, RequestRecord
from bench.report.runs import Run

PREFILL_S_PER_TOKEN = 4e-5
STEP_S = 0.016
KV_BYTES_PER_TOKEN = 131_072
SLO = {
    "short": {"ttft_ms": {"base": 350, "per_1k_tokens": 120}, "tpot_ms": 30, "target": 0.9},
    "long": {"ttft_ms": {"base": 350, "per_1k_tokens": 120}, "tpot_ms": 30, "target": 0.9},
    "default": {"ttft_ms": 800, "target": 0.9},
}
TARGETS = [
    {"name": "disaggregated", "url": "example:", "model": "example", "num_accelerators": 4},
    {"name": "colocated", "url": "example:", "model": "example", "num_accelerators": 4},
]


@dataclass(slots=True)
class _Server:
    """One queue for prompts; whoever prefills where others decode slows their tokens."""

    name: str
    is_colocated: bool
    prefill_free_s: float = 0.0

    def serve(self, random: Random, asked: RequestRecord) -> RequestRecord:
        share = 0.995 if asked.kind == "question" else random.choice((0.0, 0.0, 0.35, 0.8))
        cached = int(asked.num_prompt_tokens * share)
        compute = (asked.num_prompt_tokens - cached) * PREFILL_S_PER_TOKEN
        compute *= (1.25 if self.is_colocated else 1.0) * random.uniform(0.97, 1.1)
        ready = asked.sent_s + 0.004
        start = max(ready, self.prefill_free_s)
        self.prefill_free_s = start + compute
        first = start + compute + random.uniform(0.002, 0.006)
        transfer = 0.0 if self.is_colocated else 0.004 + 2e-7 * asked.num_prompt_tokens
        times = [first]
        for number in range(1, asked.max_tokens):
            step = STEP_S * random.uniform(0.9, 1.2)
            if self.is_colocated and random.random() < 0.03:
                step += random.expovariate(1 / 0.11)
            times.append(times[-1] + step + (transfer if number == 1 else 0.0))
        if random.random() < 0.004:
            return _failed(asked, self.name)
        queue = start - ready
        return RequestRecord(
            self.name,
            asked.index,
            asked.session,
            asked.turn,
            asked.kind,
            asked.intended_s,
            asked.sent_s,
            asked.sent_s + 0.003,
            tuple(round(at, 6) for at in times),
            (1,) * len(times),
            round(times[-1] + 0.0004, 6),
            asked.num_prompt_tokens,
            len(times),
            cached,
            asked.max_tokens,
            "ok",
            200,
            finish_reason="length",
            request_id=f"example-{asked.index}",
            timeline={"requests": [self._timeline(asked, times, (queue, compute, transfer))]},
        )

    def _timeline(
        self, asked: RequestRecord, times: list[float], took: tuple[float, float, float]
    ) -> dict[str, object]:
        queue_s, compute_s, transfer_s = took
        base = asked.sent_s + 0.001
        first = times[0] - base - 0.001
        events = {"arrived": 0.0, "tokenized": 0.0015, "reserved": 0.002}
        if not self.is_colocated:
            events["prefill_sent"] = 0.003
        events["first_token"] = first
        if not self.is_colocated:
            events["committed"] = first + transfer_s
        if len(times) > 1:
            events["first_decode"] = times[1] - base - 0.001
        events["finished"] = times[-1] - base - 0.001
        moved = {"transport": "example", "num_bytes": KV_BYTES_PER_TOKEN * asked.num_prompt_tokens}
        transfer = {**moved, "read_s": round(compute_s + transfer_s, 6)}
        prefill = {"pool_id": "prefill0", "queue_s": queue_s, "compute_s": compute_s}
        return {
            "num_prompt_tokens": asked.num_prompt_tokens,
            "decode_pool": "decode0",
            "prefill_pool": None if self.is_colocated else "prefill0",
            "events": {name: round(at, 6) for name, at in events.items()},
            "prefill": None if self.is_colocated else prefill,
            "transfer": None if self.is_colocated else transfer,
        }


def _failed(asked: RequestRecord, target: str) -> RequestRecord:
    return RequestRecord(
        target,
        asked.index,
        asked.session,
        asked.turn,
        asked.kind,
        asked.intended_s,
        asked.sent_s,
        finished_s=asked.sent_s + 0.2,
        num_prompt_tokens=asked.num_prompt_tokens,
        max_tokens=asked.max_tokens,
        outcome="http_error",
        status=503,
        error_code="overloaded",
    )


def requests(random: Random, rate: float, duration_s: float) -> Iterator[RequestRecord]:
    """An open-loop schedule: mostly short prompts, some long, documents with three questions."""
    at, index = 0.0, 0
    while (at := at + random.expovariate(rate)) < duration_s:
        draw = random.random()
        kind = "long" if draw < 0.08 else "document" if draw < 0.1 else "short"
        tokens = int(min(30_000, random.lognormvariate(6.2 if kind == "short" else 8.9, 0.6)))
        for turn in range(4 if kind == "document" else 1):
            start = at + 2.5 * turn
            is_question = kind == "document" and turn > 0
            yield RequestRecord(
                "",
                index,
                f"session-{index - turn}",
                turn,
                "question" if is_question else kind,
                round(start, 6),
                round(start + random.expovariate(1 / 0.0004), 6),
                num_prompt_tokens=max(16, tokens) + 40 * turn,
                max_tokens=random.randint(8, 48),
            )
            index += 1


def sample_run(
    seed: int, rate: float, duration_s: float = 60.0
) -> tuple[Manifest, list[RequestRecord]]:
    """Both servers under the same schedule."""
    random = Random(f"{seed}/{rate}")
    asked = sorted(requests(random, rate, duration_s), key=lambda record: record.sent_s)
    records: list[RequestRecord] = []
    for server in (_Server("disaggregated", False), _Server("colocated", True)):
        records += [server.serve(random, one) for one in asked]
    manifest = Manifest(
        version=FORMAT_VERSION,
        command=f"baton bench report --example --seed {seed}",
        seed=seed,
        workload={"name": "example: short, long, documents with questions"},
        arrival={"name": "poisson", "rate": rate},
        targets=[dict(target) for target in TARGETS],
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
    runs: list[Run] = []
    for rate in rates:
        manifest, records = sample_run(seed, rate)
        runs.append(Run(Path(f"rate-{rate:g}"), manifest, records))
    return runs
