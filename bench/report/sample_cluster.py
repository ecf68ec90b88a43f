"""What the example's servers would have said of themselves, from what became of its requests."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from bench.load.record import RequestRecord
from bench.load.samples import Blocks, ClusterSample, PoolSample
from bench.report.phases import DECODE, Phase, phases_of

BLOCK_SIZE = 16
NUM_BLOCKS = 24_000
PREFILL_PHASES = ("prefill compute", "queue and prefill")
QUEUE_PHASES = ("prefill queue",)

Lived = list[tuple[RequestRecord, dict[str, Phase]]]


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
