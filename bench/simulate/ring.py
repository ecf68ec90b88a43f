"""From which length on a ring is worth its ranks, and what it costs when many wait.

1. One prompt in an empty pool: the time to its first token when it always rings over all ranks, or
   when the production cost model says so.
2. Many prompts in the same pool, at several loads: a ring makes one prompt faster and wastes a
   little of every rank, so what helps an empty pool may hurt a full one.
3. Live, where a ring of two fits: ``bench.ring`` beside what the cost model predicts.
"""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from bench.simulate.cluster import Cluster, ClusterSetting, Served
from bench.simulate.estimates import Estimate, mean_of, percentile, pick, ratio, short
from bench.simulate.pools import DecodeSetting, PrefillSetting, seeded
from bench.simulate.report import COLOURS, VIRTUAL, NullCase, Report, Scale, Table
from bench.simulate.step_time import MEASURED, ROOFLINE, MeasuredSteps, RooflineSteps
from bench.simulate.workload import Arrival, Lengths, Mix, draw
from ring_attention.cost import CostModel

NAME = "ring"
QUESTION = "From which length on is a ring worth its ranks, and at which load?"
LENGTHS = tuple(1 << power for power in range(8, 17))
CP_SIZES = (1, 2, 4)
NEVER, ALWAYS = 1 << 40, 1  # tokens from which on prompts ring
POLICIES = {"never": NEVER, "cost model": None, "always": ALWAYS}
SLOWER = 20  # a link so many times slower, in both figures
LOADS = (0.3, 0.9)
LOADED = Lengths(8192, 0.7, 65_536)
NUM_LOADED = 40
# (tokens, runs): short ones often, for the system may put both ranks on one core at first.
LIVE = ((256, 8), (1024, 6), (2048, 3))
QUIET_CORES = 1.8  # that the two ranks of a ring had on average, if nothing else ran
Machine = MeasuredSteps | RooflineSteps


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
    costs = dataclasses.replace(steps.costs, model=model)
    return dataclasses.replace(steps, name=name, costs=costs)


def pool_of(steps: Machine, cp_size: int, threshold: int | None) -> Cluster:
    """A prefill pool, and a decode pool that takes what it computes."""
    costs = dataclasses.replace(steps.costs, ring_threshold_tokens=threshold)
    return Cluster(
        ClusterSetting(
            dataclasses.replace(steps, costs=costs),
            (DecodeSetting(num_blocks=1 << 15, max_num_sequences=256),),
            (PrefillSetting(cp_size),),
            local_prefill_threshold=0,
        )
    )


def alone(steps: Machine, cp_size: int, threshold: int | None, num_tokens: int) -> Served:
    """One prompt in an empty pool."""
    return pool_of(steps, cp_size, threshold).run([Arrival(0, 0.0, num_tokens, 1)])[0]


def machines() -> list[Machine]:
    return [MEASURED, with_link(MEASURED, SLOWER), ROOFLINE, with_link(ROOFLINE, SLOWER)]


def loaded_machines() -> list[Machine]:
    return machines()[:3]


def by_length(steps: Machine) -> Iterator[dict[str, Any]]:
    """Part 1."""
    for num_tokens in LENGTHS:
        for cp_size in CP_SIZES:
            for policy in ("cost model", "always"):
                served = alone(steps, cp_size, POLICIES[policy], num_tokens)
                yield {
                    "part": "alone", "machine": steps.name, "tokens": num_tokens, "cp": cp_size,
                    "policy": policy, "ttft_s": served.ttft_s, "ring": served.ring_size,
                }  # fmt: skip


def by_load(steps: Machine, scale: Scale) -> Iterator[dict[str, Any]]:
    """Part 2."""
    random, cp_size = seeded(NAME, "lengths"), max(CP_SIZES)
    per_s = cp_size / statistics.fmean(
        steps.chunk_s(LOADED.draw(random), 0, 1) for _ in range(1000)
    )
    for seed in scale.seeds:
        for load in LOADS:
            mix = Mix("long", 1.0, LOADED, Lengths(1, 0))
            num = scale.count(NUM_LOADED, 10)
            arrivals = draw(seeded(NAME, seed, load), load * per_s, num, [mix])
            for policy, threshold in POLICIES.items():
                served = pool_of(steps, cp_size, threshold).run(arrivals)
                ttfts = [one.ttft_s for one in served]
                yield {
                    "part": "loaded", "machine": steps.name, "seed": seed, "load": load,
                    "policy": policy, "ttft_mean_s": statistics.fmean(ttfts),
                    "ttft_p99_s": percentile(ttfts, 0.99),
                }  # fmt: skip


def live() -> Iterator[dict[str, Any]]:
    """Part 3: two processes with one thread each, as ``python -m bench.ring`` runs them."""
    from bench.ring import measure, model_folder  # with torch, which nothing else here needs

    with model_folder(None) as folder:
        for num_tokens, num_runs in LIVE:
            pairs = measure(folder, num_tokens, num_runs)["pairs"]
            best = min(pairs, key=lambda pair: float(pair["cp2_s"]))
            predict = MEASURED.costs.seconds
            yield {
                "part": "live", "tokens": num_tokens,
                "cores": best["cp2_cpu_s"] / best["cp2_s"],
                "cp1_s": min(pair["cp1_s"] for pair in pairs),
                "cp2_s": best["cp2_s"],
                "table_cp1_s": MEASURED.chunk_s(num_tokens, 0, 1),
                "predicted_gain": predict(num_tokens, 0, 1) / predict(num_tokens, 0, 2),
            }  # fmt: skip


def first_length(rows: Sequence[dict[str, Any]], machine: str, cp_size: int) -> tuple[str, str]:
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
    short_s = [alone(MEASURED, cp_size, None, 64).ttft_s for cp_size in CP_SIZES]
    spread = max(short_s) / min(short_s) - 1
    free = with_link(ROOFLINE, 0)
    times = {cp_size: alone(free, cp_size, ALWAYS, 8192).ttft_s for cp_size in CP_SIZES}
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
    for steps in loaded_machines():
        rows += by_load(steps, scale)
    rows += live() if scale.live else ()
    return Report(
        name=NAME,
        question=QUESTION,
        clock=VIRTUAL,
        setting=[
            "Prefill pools of 1, 2 and 4 ranks, chunks of 2048 tokens for each rank of a ring.",
            f"Loaded: prompts of {LOADED.mean:g} tokens on average, CV {LOADED.cv:g}, Poisson, on "
            "4 ranks; load 1 is what four ranks can compute one by one.",
            *(f"`{steps.name}`: {steps.source}." for steps in (MEASURED, ROOFLINE)),
        ],
        tables=_tables(rows),
        nulls=null_cases(),
        reading=_reading(rows),
        rows=rows,
        draw=partial(_draw, rows),
        live_part="The live part is wall time: two processes of one thread each, with the "
        "benchmark model."
        if scale.live
        else "",
    )


def _tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    lines: list[tuple[str, ...]] = [
        (steps.name, *first_length(rows, steps.name, 2), *first_length(rows, steps.name, 4))
        for steps in machines()
    ]
    header: Sequence[str] = (
        "machine",
        "cp2 faster from",
        "cp2 chosen from",
        "cp4 faster from",
        "cp4 chosen from",
    )
    tables = [Table("Alone: prompt lengths in tokens", header, tuple(lines))]
    tables.append(_loaded_table(rows))
    measured = [row for row in rows if row["part"] == "live"]
    if measured:
        lines = [
            (
                str(row["tokens"]), short(row["cp1_s"]), short(row["table_cp1_s"]),
                short(row["cp2_s"]), f"{row['cp1_s'] / row['cp2_s']:.2f}",
                f"{row['predicted_gain']:.2f}", f"{row['cores']:.2f}",
            )
            for row in measured
        ]  # fmt: skip
        header = (
            "tokens",
            "1 rank (s)",
            "table (s)",
            "cp2 (s)",
            "gain",
            "gain predicted",
            "cores had",
        )
        tables.append(Table("Live: a ring of two beside the cost model", header, tuple(lines)))
    return tables


def _over_never(
    rows: Sequence[dict[str, Any]], machine: str, load: float, policy: str, figure: str
) -> Estimate:
    where = {"part": "loaded", "machine": machine, "load": load}
    found = (pick(rows, figure, policy=one, **where) for one in (policy, "never"))
    return ratio(*found)


def _loaded_table(rows: Sequence[dict[str, Any]]) -> Table:
    lines = []
    for steps in loaded_machines():
        for load in LOADS:
            where = {"part": "loaded", "machine": steps.name, "load": load}
            cells = [
                str(_over_never(rows, steps.name, load, policy, figure))
                for figure in ("ttft_mean_s", "ttft_p99_s")
                for policy in ("cost model", "always")
            ]
            never = mean_of(pick(rows, "ttft_mean_s", policy="never", **where))
            lines.append((f"{steps.name}, {load:g}", str(never), *cells))
    header = [
        "machine, load",
        "never, mean s",
        "cost model / never",
        "always / never",
        "p99, cost model / never",
        "p99, always / never",
    ]
    return Table("Loaded: time to the first token", header, tuple(lines))


def _reading(rows: Sequence[dict[str, Any]]) -> list[str]:
    fast, slow = (first_length(rows, machine.name, 4) for machine in machines()[:2])
    effect = {
        (steps.name, load, policy): _over_never(rows, steps.name, load, policy, "ttft_mean_s")
        for steps in loaded_machines()
        for load in LOADS
        for policy in ("always", "cost model")
    }
    reading = [
        f"On the measured machine a ring of four is faster from {fast[0]} tokens on, and the cost "
        f"model takes it from {fast[1]} on; with links {SLOWER} times slower, {slow[0]} and "
        f"{slow[1]}. Between the two figures the cost model gives latency away on purpose: a ring "
        "must keep 0.7 of its ranks' throughput.",
        *(
            f"Many prompts, `{steps.name}`: with load {LOADS[0]:g} always ringing makes the mean "
            f"time to the first token {effect[steps.name, LOADS[0], 'always']} times that of never "
            f"ringing, with load {LOADS[1]:g} {effect[steps.name, LOADS[1], 'always']} times; what "
            f"the cost model chooses makes it {effect[steps.name, LOADS[0], 'cost model']} and "
            f"{effect[steps.name, LOADS[1], 'cost model']} times."
            for steps in loaded_machines()
        ),
        "The cost model looks at a prompt, not at the queue: it rings as much when many wait.",
    ]
    measured = [row for row in rows if row["part"] == "live"]
    if measured:
        reading.append(_live_reading(measured))
    return reading


def _live_reading(rows: Sequence[dict[str, Any]]) -> str:
    errors = [row["predicted_gain"] / (row["cp1_s"] / row["cp2_s"]) - 1 for row in rows]
    found = ", ".join(
        f"{error:+.0%} at {row['tokens']} tokens" for row, error in zip(rows, errors, strict=True)
    )
    cores = min(row["cores"] for row in rows)
    quiet = ""
    if cores < QUIET_CORES:
        quiet = (
            f" The two ranks had but {cores:.1f} of two cores even then: others ran here, and a "
            "ring waits for its slowest rank. These figures want another run."
        )
    return (
        f"Live, the gain that the cost model predicts for a ring of two is off by {found} (the "
        "least of some runs: the system may put both ranks on one core for a second, and a short "
        "prompt gains nothing). Rings of four were not run: there are no four cores here."
        f"{quiet}"
    )


def _draw(rows: Sequence[dict[str, Any]], figure: Any) -> None:  # noqa: ANN401 - matplotlib's
    left, right = figure.subplots(1, 2)
    for machine, style in ((machines()[0], "-"), (machines()[1], ":")):
        for colour, cp_size in zip(COLOURS, CP_SIZES, strict=False):
            if cp_size == 1 and style == ":":
                continue  # it has no links
            where = {"machine": machine.name, "cp": cp_size, "policy": "always", "part": "alone"}
            single = pick(rows, "ttft_s", **{**where, "cp": 1})
            ringed = pick(rows, "ttft_s", **where)
            label = f"cp{cp_size}" + (", slow links" if style == ":" else "")
            ys = [one / other for one, other in zip(single, ringed, strict=True)]
            left.plot(LENGTHS, ys, style, marker="o", markersize=4, color=colour, label=label)
    left.set_xscale("log", base=2)
    left.set_xticks(LENGTHS[::2], [f"{n / 1024:g}K" for n in LENGTHS[::2]])
    left.set(xlabel="tokens of the prompt", ylabel="speed, as a multiple of one rank's",
             title="one prompt, always ringing, measured machine")  # fmt: skip
    left.legend(frameon=False, loc="center right", bbox_to_anchor=(1.0, 0.7))
    left.set_ylim(0, 4.2)
    places = [(steps.name, load) for steps in loaded_machines() for load in LOADS]
    for offset, policy in enumerate(("cost model", "always")):
        found = [_over_never(rows, *place, policy, "ttft_mean_s") for place in places]
        errors = [[f.value - f.low for f in found], [f.high - f.value for f in found]]
        xs = [index + 0.38 * offset for index in range(len(places))]
        right.bar(xs, [f.value for f in found], 0.36, yerr=errors, capsize=3,
                  color=COLOURS[offset], label=f"rings: {policy}")  # fmt: skip
    right.axhline(1.0, color="#888888", linewidth=0.8)
    ticks = [index + 0.19 for index in range(len(places))]
    right.set_xticks(ticks, [_tick(*place) for place in places], fontsize=8)
    right.set(ylabel="mean time to first token, of never ringing's",
              title="many prompts on four ranks")  # fmt: skip
    right.set_ylim(0, 1.25)
    right.legend(frameon=False, loc="upper left", ncols=2)


def _tick(machine: str, load: float) -> str:
    first, _, links = machine.partition(", ")
    return "\n".join([first, f"load {load:g}", *(["slow links"] if links else [])])
