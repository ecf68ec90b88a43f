"""From which length on a ring is worth its ranks, and what it costs when many wait.

1. One prompt in an empty pool: the time to its first token when it always rings over all ranks, or
   when the production cost model says so.
2. Many prompts in the same pool, at several loads: a ring makes one prompt faster and wastes a
   little of every rank, so what helps an empty pool may hurt a full one.
3. Live, where a ring of two fits: ``bench.ring`` beside what the cost model predicts.
"""

import dataclasses
import statistics
from collections.abc import Iterator
from random import Random
from typing import Any

from bench.load.analysis.metrics import ttft_of
from bench.load.record import RequestRecord
from bench.load.workload.lengths import count_of
from bench.load.workload.sessions import Lengths
from bench.report.drawing.plot import Axis, Lanes, Line, Plot, Rule, Span, Spans, Whiskers
from bench.simulate.driver import ClusterSetting, serve
from bench.simulate.estimates import Estimate, mean_of, pick, ratio, short, tail
from bench.simulate.pools import DecodeSetting, PrefillSetting
from bench.simulate.report import NullCase, Report, Scale, Table
from bench.simulate.step_time import MEASURED, ROOFLINE, MeasuredSteps, RooflineSteps
from bench.simulate.workload import lengths, traffic
from ring_attention.cost import CostModel

NAME = "ring"
LENGTHS = tuple(1 << power for power in range(8, 17))
CP_SIZES = (1, 2, 4)
NEVER, ALWAYS = 1 << 40, 1  # tokens from which on prompts ring
POLICIES = {"never": NEVER, "cost model": None, "always": ALWAYS}
SLOWER = 20  # a link so many times slower, in both figures
LOADS = (0.3, 0.9)
LOADED_MEAN, LOADED = 8192, lengths(8192, 0.7)
NUM_LOADED = 40
# (tokens, runs): short ones often, for the system may put both ranks on one core at first.
LIVE = ((256, 8), (1024, 6), (2048, 3))
Machine = MeasuredSteps | RooflineSteps
Rows = list[dict[str, Any]]


def with_link(steps: Machine, slower: float) -> Machine:
    """The same ranks with other links; infinitely fast ones for 0."""
    own = steps.costs.model
    model = CostModel(
        own.attention_flops_per_s,
        own.linear_flops_per_s,
        own.bandwidth_bytes_per_s / slower if slower else float("inf"),
        own.latency_s * slower,
    )
    name = steps.name if slower == 1 else f"{steps.name}, links {slower:g} times slower"
    return dataclasses.replace(
        steps, name=name, costs=dataclasses.replace(steps.costs, model=model)
    )


def setting(steps: Machine, cp_size: int, threshold: int | None) -> ClusterSetting:
    """A prefill pool, and a decode pool that takes what it computes."""
    costs = dataclasses.replace(steps.costs, ring_threshold_tokens=threshold)
    return ClusterSetting(
        dataclasses.replace(steps, costs=costs),
        (DecodeSetting(num_blocks=1 << 15, max_num_sequences=256),),
        (PrefillSetting(cp_size),),
        local_prefill_threshold=0,
    )


def ring_size(record: RequestRecord) -> int:
    """How many ranks computed its prompt together."""
    assert record.timeline is not None
    size: int = record.timeline["requests"][0]["prefill"]["ring_size"]
    return size


def alone(steps: Machine, cp_size: int, threshold: int | None, num_tokens: int) -> RequestRecord:
    """One prompt in an empty pool."""
    one = traffic(Lengths(str(num_tokens), "1"), 1.0, 0, 1)
    return serve(setting(steps, cp_size, threshold), one)[0]


def machines() -> list[Machine]:
    return [MEASURED, with_link(MEASURED, SLOWER), ROOFLINE, with_link(ROOFLINE, SLOWER)]


def by_length(steps: Machine) -> Iterator[dict[str, Any]]:
    """Part 1."""
    for num_tokens in LENGTHS:
        for cp_size in CP_SIZES:
            for policy in ("cost model", "always"):
                record = alone(steps, cp_size, POLICIES[policy], num_tokens)
                yield {
                    "part": "alone",
                    "machine": steps.name,
                    "tokens": num_tokens,
                    "cp": cp_size,
                    "policy": policy,
                    "ttft_s": ttft_of(record),
                    "ring": ring_size(record),
                }


def by_load(steps: Machine, scale: Scale) -> Iterator[dict[str, Any]]:
    """Part 2."""
    random, draw, cp_size = Random(NAME), count_of(LOADED), max(CP_SIZES)
    per_s = cp_size / statistics.fmean(steps.chunk_s(draw(random), 0, 1) for _ in range(1000))
    for seed in scale.seeds:
        for load in LOADS:
            asked = traffic(Lengths(LOADED, "1"), load * per_s, seed, scale.count(NUM_LOADED, 10))
            for policy, threshold in POLICIES.items():
                records = serve(setting(steps, cp_size, threshold), asked)
                ttfts = [ttft_of(record) or 0.0 for record in records]
                yield {
                    "part": "loaded",
                    "machine": steps.name,
                    "seed": seed,
                    "load": load,
                    "policy": policy,
                    "ttft_mean_s": statistics.fmean(ttfts),
                    "ttft_p99_s": tail(ttfts),
                }


def live() -> Iterator[dict[str, Any]]:
    """Part 3: two processes with one thread each, as ``python -m bench.ring`` runs them."""
    from bench.ring import measure, model_folder  # with torch, which nothing else here needs

    with model_folder(None) as folder:
        for num_tokens, num_runs in LIVE:
            pairs = measure(folder, num_tokens, num_runs)["pairs"]
            best = min(pairs, key=lambda pair: float(pair["cp2_s"]))
            predict = MEASURED.costs.seconds
            yield {
                "part": "live",
                "tokens": num_tokens,
                "cores": best["cp2_cpu_s"] / best["cp2_s"],
                "cp1_s": min(pair["cp1_s"] for pair in pairs),
                "cp2_s": best["cp2_s"],
                "table_cp1_s": MEASURED.chunk_s(num_tokens, 0, 1),
                "predicted_gain": predict(num_tokens, 0, 1) / predict(num_tokens, 0, 2),
            }


def first_length(rows: Rows, machine: str, cp_size: int) -> tuple[str, str]:
    """(from which the ring is faster at all, from which the cost model takes it)."""
    faster = chosen = "never"
    for num_tokens in reversed(LENGTHS):
        where = {"machine": machine, "tokens": num_tokens, "part": "alone"}
        (single,) = pick(rows, "ttft_s", cp=1, policy="always", **where)
        (ringed,) = pick(rows, "ttft_s", cp=cp_size, policy="always", **where)
        if ringed < single:
            faster = str(num_tokens)
        if pick(rows, "ring", cp=cp_size, policy="cost model", **where) == [cp_size]:
            chosen = str(num_tokens)
    return faster, chosen


def null_cases() -> list[NullCase]:
    """A prompt too short to ring; and links that cost nothing."""
    short_s = [ttft_of(alone(MEASURED, cp_size, None, 64)) or 0.0 for cp_size in CP_SIZES]
    spread = max(short_s) / min(short_s) - 1
    free = with_link(ROOFLINE, 0)
    times = {cp: ttft_of(alone(free, cp, ALWAYS, 8192)) or 0.0 for cp in CP_SIZES}
    efficiency = min(times[1] / (cp_size * times[cp_size]) for cp_size in CP_SIZES)
    return [
        NullCase(
            "a prompt of 64 tokens in pools of 1, 2 and 4 ranks, time to the first token",
            f"differs by {spread:.2%}",
            spread < 1e-6,
        ),
        NullCase(
            "links that take no time, rings of 2 and 4, T(1) / (N T(N))",
            f"at least {efficiency:.4f}",
            abs(efficiency - 1) < 1e-3,
        ),
    ]


def run(scale: Scale) -> Report:
    """All of it."""
    rows = [row for steps in machines() for row in by_length(steps)]
    for steps in machines()[:3]:
        rows += by_load(steps, scale)
    rows += live() if scale.live else ()
    return Report(
        name=NAME,
        question="From which length on is a ring worth its ranks, and at which load?",
        setting=[
            "Prefill pools of 1, 2 and 4 ranks, chunks of 2048 tokens for each rank of a ring.",
            f"Loaded: prompts of {LOADED_MEAN} tokens on average, CV 0.7, Poisson, on 4 ranks; "
            "load 1 is what four ranks can compute one by one.",
            *(f"`{steps.name}`: {steps.source}." for steps in (MEASURED, ROOFLINE)),
        ],
        tables=_tables(rows),
        nulls=null_cases(),
        reading=_reading(rows),
        rows=rows,
        plots=[_alone_plot(rows), _loaded_plot(rows)],
        live_part="The live part is wall time: two processes of one thread each, with the "
        "benchmark model."
        if scale.live
        else "",
    )


def _over_never(rows: Rows, machine: str, load: float, policy: str, figure: str) -> Estimate:
    where = {"part": "loaded", "machine": machine, "load": load}
    return ratio(*(pick(rows, figure, policy=one, **where) for one in (policy, "never")))


def _places() -> list[tuple[str, float]]:
    return [(steps.name, load) for steps in machines()[:3] for load in LOADS]


def _tables(rows: Rows) -> list[Table]:
    names = [steps.name for steps in machines()]
    ends = [(name, *first_length(rows, name, 2), *first_length(rows, name, 4)) for name in names]
    columns = [f"cp{cp} {word} from" for cp in (2, 4) for word in ("faster", "chosen")]
    tables = [Table("Alone: prompt lengths in tokens", ("machine", *columns), ends)]
    lines = []
    for machine, load in _places():
        where = {"part": "loaded", "machine": machine, "load": load, "policy": "never"}
        cells = [
            str(_over_never(rows, machine, load, policy, figure))
            for figure in ("ttft_mean_s", "ttft_p99_s")
            for policy in ("cost model", "always")
        ]
        never = mean_of(pick(rows, "ttft_mean_s", **where))
        lines.append((f"{machine}, {load:g}", str(never), *cells))
    columns = [f"{word}{policy} / never" for word in ("", "p99, ") for policy in list(POLICIES)[1:]]
    header = ("machine, load", "never, mean s", *columns)
    tables.append(Table("Loaded: time to the first token", header, lines))
    measured = [row for row in rows if row["part"] == "live"]
    if measured:
        live_lines = [
            (
                str(row["tokens"]),
                *(short(row[name]) for name in ("cp1_s", "table_cp1_s", "cp2_s")),
                *(f"{row['cp1_s'] / row['cp2_s']:.2f}", f"{row['predicted_gain']:.2f}"),
                f"{row['cores']:.2f}",
            )
            for row in measured
        ]
        live_header = ("tokens", "1 rank (s)", "table (s)", "cp2 (s)", "gain", "predicted", "cores")
        tables.append(Table("Live: a ring of two beside the model", live_header, live_lines))
    return tables


def _reading(rows: Rows) -> list[str]:
    fast, slow = (first_length(rows, machine.name, 4) for machine in machines()[:2])
    lines = [
        f"On the measured machine a ring of four is faster from {fast[0]} tokens on, and the cost "
        f"model takes it from {fast[1]} on; with links {SLOWER} times slower, {slow[0]} and "
        f"{slow[1]}. Between the two figures the cost model gives latency away on purpose: a ring "
        "must keep 0.7 of its ranks' throughput.",
    ]
    for machine, load in _places():
        always, model = (
            _over_never(rows, machine, load, policy, "ttft_mean_s")
            for policy in ("always", "cost model")
        )
        lines.append(
            f"Many prompts, `{machine}`, load {load:g}: always ringing makes the mean time to the "
            f"first token {always} times that of never ringing, the cost model {model} times."
        )
    lines.append(
        "The cost model looks at a prompt, not at the queue: it rings as much when many wait."
    )
    if any(row["part"] == "live" for row in rows):
        lines.append(
            "Live figures are the least of some runs: the system may put both ranks on one core "
            "for a second. A ring waits for its slowest rank, so fewer than two cores had means "
            "that others ran here. Rings of four were not run."
        )
    return lines


def _alone_plot(rows: Rows) -> Plot:
    layers = []
    for machine, dashes in ((machines()[0], ""), (machines()[1], "dot")):
        for color, cp_size in enumerate(CP_SIZES):
            if cp_size == 1 and dashes:
                continue  # it has no links
            where = {"machine": machine.name, "policy": "always", "part": "alone"}
            single, ringed = (pick(rows, "ttft_s", cp=cp, **where) for cp in (1, cp_size))
            gains = [one / other for one, other in zip(single, ringed, strict=True)]
            points = tuple(zip(map(float, LENGTHS), gains, strict=True))
            name = f"cp{cp_size}" + (", slow links" if dashes else "")
            layers.append(Line(name, color, points, "dot" if dashes else "", dots=True))
    return Plot(
        "ring-alone",
        "One prompt, always ringing, measured machine (simulated)",
        Axis("tokens of the prompt", "tokens", log=True),
        Axis("speed, as a multiple of one rank's", low=0.0),
        tuple(layers),
    )


def _loaded_plot(rows: Rows) -> Plot:
    names: list[str] = []
    spans: dict[str, list[Span]] = {}
    whiskers: list[tuple[int, float, float]] = []
    for machine, load in _places():
        for policy in list(POLICIES)[1:]:
            found = _over_never(rows, machine, load, policy, "ttft_mean_s")
            lane = len(names)
            names.append(f"{machine}, load {load:g}, {policy}")
            spans.setdefault(policy, []).append(Span(lane, 0.0, found.value, f"{found}"))
            whiskers.append((lane, found.low, found.high))
    bars = [Spans(policy, color, tuple(own)) for color, (policy, own) in enumerate(spans.items())]
    return Plot(
        "ring-loaded",
        "Many prompts: mean time to the first token over never ringing (simulated)",
        Axis("ratio", low=0.0),
        Lanes(tuple(names)),
        (*bars, Whiskers(tuple(whiskers)), Rule(1.0, "never", vertical=True)),
    )
