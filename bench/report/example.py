"""An example run of a disaggregated and a colocated server, drawn from a seed: no server is asked.

It is what ``baton bench report --example`` shows: how a report looks before one has figures. The
two servers are queues: the disaggregated one prefills on its own pool and hands over, the colocated
one stalls the tokens of everybody while it prefills. Their report says that it is made up.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random

from bench.load.record import FORMAT_VERSION, Manifest, RequestRecord
from bench.load.samples import Blocks, ClusterSample, PoolSample
from bench.report.figures.phases import DECODE, Phase, phases_of
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


BLOCK_SIZE = 16
NUM_BLOCKS = 24_000
PREFILL_PHASES = ("prefill compute", "queue and prefill")
QUEUE_PHASES = ("prefill queue",)

Lived = list[tuple[RequestRecord, dict[str, Phase]]]


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
        folder, states = Path(f"rate-{rate:g}"), sample_states(records)
        runs.append(Run(folder, manifest, records, samples=states))
    return runs


# ---- what the servers would have said of themselves --------------------------------------------


def sample_states(records: Sequence[RequestRecord]) -> list[ClusterSample]:
    """Both servers, once a second."""
    found: list[ClusterSample] = []
    for target in dict.fromkeys(record.target for record in records):
        lived: Lived = [
            (record, {phase.name: phase for phase in phases_of(record)})
            for record in records
            if record.target == target and record.outcome == "ok"
        ]
        ends = [record.finished_s or 0.0 for record, _ in lived]
        totals = _totals(lived)
        is_split = any("prefill compute" in phases for _, phases in lived)
        for second in range(math.ceil(max(ends, default=0.0)) + 1):
            at_s = float(second)
            pools = _pools(lived, totals, at_s, is_split=is_split)
            num_active = sum(r.sent_s <= at_s < (r.finished_s or 0.0) for r, _ in lived)
            found.append(ClusterSample(target, at_s, 0.002, num_active, pools))
    return found


def _totals(lived: Lived) -> dict[str, tuple[list[float], list[float]]]:
    """(instants, totals from then on) of each counter."""
    steps: dict[str, list[tuple[float, int]]] = {"prompt": [], "cached": [], "output": []}
    for record, _ in lived:
        first_s = record.token_times_s[0]
        steps["prompt"].append((first_s, record.num_prompt_tokens))
        steps["cached"].append((first_s, record.num_cached_tokens or 0))
        steps["output"] += [(at_s, 1) for at_s in record.token_times_s]
    found: dict[str, tuple[list[float], list[float]]] = {}
    for name, own in steps.items():
        own.sort()
        found[name] = [at for at, _ in own], list(accumulate(float(count) for _, count in own))
    return found


def _pools(
    lived: Lived, totals: dict[str, tuple[list[float], list[float]]], at_s: float, *, is_split: bool
) -> tuple[PoolSample, ...]:
    def total(name: str) -> float:
        instants, sums = totals[name]
        index = bisect_right(instants, at_s)
        return sums[index - 1] if index else 0.0

    prefilling = _during(lived, PREFILL_PHASES, at_s)
    waiting = _during(lived, QUEUE_PHASES, at_s)
    decoding = _during(lived, (DECODE,), at_s)
    computed = total("prompt") - total("cached")
    counters = {
        "prompt_tokens_total": total("prompt"),
        "cached_tokens_total": total("cached"),
        "output_tokens_total": total("output"),
        "preemptions_total": 0.0,
    }
    filled = _blocks([*decoding, *([] if is_split else prefilling)], computed)
    running = len(decoding) + (0 if is_split else len(prefilling))
    decode = PoolSample("decode0", "decode", True, running, 0, 0, (filled,), counters)
    if not is_split:
        return (decode,)
    prefill = PoolSample(
        "prefill0",
        "prefill",
        True,
        len(prefilling),
        len(waiting),
        sum(record.num_prompt_tokens for record in waiting),
        (_blocks(prefilling, computed),),
        {"prefill_computed_tokens": computed, "prefill_cached_tokens": total("cached")},
    )
    return prefill, decode


def _during(lived: Lived, names: Sequence[str], at_s: float) -> list[RequestRecord]:
    """Those that are in one of these phases."""
    return [
        record
        for record, phases in lived
        for name in names
        if name in phases and phases[name].start_s <= at_s - record.intended_s < phases[name].end_s
    ]


def _blocks(held_by: Sequence[RequestRecord], computed: float) -> Blocks:
    """What these requests hold, and what all before them have left in the cache."""
    owned = sum(-(-(r.num_prompt_tokens + r.num_output_tokens) // BLOCK_SIZE) for r in held_by)
    owned = min(owned, NUM_BLOCKS)
    cached = min(NUM_BLOCKS - owned, int(computed / BLOCK_SIZE))
    return Blocks(NUM_BLOCKS, NUM_BLOCKS - owned - cached, owned, cached=cached)
