"""Split or not: the same four ranks as one kind of pool, or as prefill and decode pools.

Attainment is the share of requests that meet a deadline for the first token, which grows with the
prompt, and a limit between tokens. Goodput is the largest offered load at which at least nine in
ten do. The traffic comes open loop at each load; all ranks are counted, idle ones too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.simulate.cluster import Cluster, ClusterSetting, Served
from bench.simulate.estimates import Estimate, difference, mean_of, pick
from bench.simulate.pools import DecodeSetting, PrefillSetting, seeded
from bench.simulate.report import COLOURS, VIRTUAL, NullCase, Report, Scale, Table
from bench.simulate.step_time import MEASURED, ROOFLINE, StepTime
from bench.simulate.workload import Arrival, Lengths, Mix, draw

NAME = "disaggregation"
QUESTION = "At equal ranks, where does splitting prefill from decode pay, and where not?"
NUM_RANKS = 4
LOADS = (0.15, 0.3, 0.5, 0.7, 0.9)
NUM_REQUESTS = {"mixed": 80, "chats": 80, "documents": 40}
TARGET = 0.9
BATCH = 8
NULL_LOAD = 0.001
CONFIGURATIONS: dict[str, tuple[int, tuple[int, ...]]] = {  # decode ranks, cp of prefill pools
    "4 colocated": (4, ()),
    "1 prefill + 3 decode": (3, (1,)),
    "ring of 2 + 2 decode": (2, (2,)),
    "3 prefill + 1 decode": (1, (1, 1, 1)),
    "ring of 3 + 1 decode": (1, (3,)),
}
BASELINE, *SPLITS = CONFIGURATIONS


@dataclass(frozen=True, slots=True)
class Slo:
    """Deadlines in units of the machine, so that both machines have the same ones.

    Args:
        tpot: mean time between tokens, in steps of eight sequences.
        stall: the longest time between two tokens, in the same.
        prefill: time to the first token, in times of the prompt alone on one rank; ten steps more.
    """

    name: str
    tpot: float = float("inf")
    stall: float = float("inf")
    prefill: float = 3.0

    def is_met(self, steps: StepTime, served: Served) -> bool:
        step_s = steps.step_s(BATCH, BATCH * 256, [])
        alone_s = steps.chunk_s(served.arrival.num_prompt_tokens, 0, 1)
        return (
            served.ttft_s <= self.prefill * alone_s + 10 * step_s
            and served.tpot_s <= self.tpot * step_s
            and max(served.itls_s, default=0.0) <= self.stall * step_s
        )


SLOS = (
    Slo("relaxed: TPOT 4 steps", tpot=4.0),
    Slo("strict: TPOT 1.5 steps", tpot=1.5),
    Slo("no stall: no gap of 8 steps", tpot=4.0, stall=8.0),
)
SHORT = {slo.name: slo.name.partition(":")[0] for slo in SLOS}


def mixes(steps: StepTime) -> dict[str, list[Mix]]:
    """Workloads; the roofline's prompts are longer, as its ranks are faster."""
    long_tokens = 2048 if steps is MEASURED else 8192
    chat = Mix("chat", 0.7, Lengths(64, 0.5, 120), Lengths(64, 0.5, 512))
    document = Mix("document", 0.3, Lengths(long_tokens, 0.5), Lengths(16, 0.5, 64))
    return {"mixed": [chat, document], "chats": [chat], "documents": [document]}


CASES: tuple[tuple[StepTime, str], ...] = (
    (MEASURED, "mixed"), (ROOFLINE, "mixed"), (MEASURED, "chats"), (MEASURED, "documents"),
)  # fmt: skip


def capacity(steps: StepTime, workload: Sequence[Mix]) -> float:
    """Requests a second of four colocated ranks that are never idle, with batches of eight."""
    total = sum(mix.share for mix in workload)
    step_s = steps.step_s(BATCH, BATCH * 256, [])
    work_s = sum(
        mix.share / total
        * (steps.chunk_s(round(mix.prompt.mean), 0, 1) + mix.output.mean * step_s / BATCH)
        for mix in workload
    )  # fmt: skip
    return NUM_RANKS / work_s


def cluster_of(steps: StepTime, configuration: str) -> Cluster:
    num_decode, rings = CONFIGURATIONS[configuration]
    decode = DecodeSetting(512, 64, num_blocks=1 << 14)
    prefill = tuple(PrefillSetting(cp_size, num_blocks=1 << 14) for cp_size in rings)
    return Cluster(ClusterSetting(steps, (decode,) * num_decode, prefill))


def traffic(steps: StepTime, name: str, load: float, seed: int, num: int) -> list[Arrival]:
    workload = mixes(steps)[name]
    random = seeded(NAME, steps.name, name, load, seed)
    return draw(random, load * capacity(steps, workload), num, workload)


def attainments(
    steps: StepTime, workload: str, scale: Scale, loads: Sequence[float] = LOADS
) -> Iterator[dict[str, Any]]:
    """Shares of requests in time, by load."""
    num = scale.count(NUM_REQUESTS[workload], 20)
    for seed in scale.seeds:
        for load in loads:
            arrivals = traffic(steps, workload, load, seed, num)
            for configuration in CONFIGURATIONS:
                served = cluster_of(steps, configuration).run(arrivals)
                met = {
                    slo.name: sum(slo.is_met(steps, one) for one in served) / num for slo in SLOS
                }
                yield {
                    "machine": steps.name, "workload": workload, "seed": seed, "load": load,
                    "configuration": configuration, **met,
                }  # fmt: skip


def goodput(loads: Sequence[float], shares: Sequence[float]) -> float:
    """The load at which attainment first falls below the target, linear between the points."""
    before_load, before = 0.0, 1.0
    for load, share in zip(loads, shares, strict=True):
        if share < TARGET:
            return before_load + (load - before_load) * (before - TARGET) / (before - share)
        before_load, before = load, share
    return before_load


def goodputs(
    rows: Sequence[dict[str, Any]], machine: str, workload: str, configuration: str, slo: str
) -> list[float]:
    """Of each seed."""
    where = {"machine": machine, "workload": workload, "configuration": configuration}
    seeds = sorted({row["seed"] for row in rows})
    return [goodput(LOADS, pick(rows, slo, seed=seed, **where)) for seed in seeds]


def null_case(scale: Scale) -> NullCase:
    """Chats one at a time: nobody is in anybody's way, so there is nothing to separate."""
    ratios = []
    for seed in scale.seeds:
        arrivals = traffic(MEASURED, "chats", NULL_LOAD, seed, scale.count(40, 10))
        runs = [cluster_of(MEASURED, name).run(arrivals) for name in CONFIGURATIONS]
        times = [sum(one.e2e_s for one in served) for served in runs]
        ratios += [time_s / times[0] for time_s in times[1:]]
    found = max(abs(one - 1) for one in ratios)
    return NullCase(
        f"chats at a load of {NULL_LOAD:g}, time to the last token against colocated",
        f"differs by {found:.2%} at most",
        found < 0.02,
    )


def run(scale: Scale) -> Report:
    """All of it."""
    rows = [row for steps, name in CASES for row in attainments(steps, name, scale)]
    return Report(
        name=NAME,
        question=QUESTION,
        clock=VIRTUAL,
        setting=[
            "Four ranks in each configuration; the production router and the production rule on "
            "who computes a prompt (up to 128 new tokens the decode pool does).",
            "Chats: prompts of 64 tokens, answers of 64. Documents: prompts of 2048 (measured) or "
            "8192 (roofline), answers of 16; CV 0.5. Mixed: 7 chats to 3 documents. Poisson.",
            "Load 1 is what four colocated ranks could do that are never idle and always full.",
            "First token within 3 times the prompt's time alone on a rank and ten steps; a step is "
            f"that of {BATCH} sequences. Goodput: load at which {TARGET:.0%} are in time.",
            *(f"`{steps.name}`: {steps.source}." for steps in (MEASURED, ROOFLINE)),
        ],
        tables=[_verdicts(rows), *(_table(rows, slo) for slo in SLOS)],
        nulls=[null_case(scale)],
        reading=_reading(rows),
        rows=rows,
        draw=partial(_draw, rows),
        size=(12.5, 6.4),
    )


def _table(rows: Sequence[dict[str, Any]], slo: Slo) -> Table:
    lines = []
    for steps, workload in CASES:
        found = {
            name: goodputs(rows, steps.name, workload, name, slo.name) for name in CONFIGURATIONS
        }
        cells = [str(mean_of(found[name])) for name in CONFIGURATIONS]
        gains = [str(difference(found[name], found[BASELINE])) for name in SPLITS]
        lines.append((f"{steps.name}, {workload}", *cells, *gains))
    header = ("case", *CONFIGURATIONS, *(f"{name}, more" for name in SPLITS))
    return Table(f"Goodput as a load; {slo.name}", header, tuple(lines))


def _best(
    rows: Sequence[dict[str, Any]], steps: StepTime, workload: str, slo: Slo
) -> tuple[str, Estimate]:
    """The split with the most goodput, and how much more it has than colocated."""
    base = goodputs(rows, steps.name, workload, BASELINE, slo.name)
    gains = {
        name: difference(goodputs(rows, steps.name, workload, name, slo.name), base)
        for name in SPLITS
    }
    best = max(SPLITS, key=lambda name: gains[name].value)
    return best, gains[best]


def _verdict(gain: Estimate) -> str:
    if not gain.excludes(0.0):
        return "not told apart"
    return "pays" if gain.value > 0 else "loses"


def _verdicts(rows: Sequence[dict[str, Any]]) -> Table:
    lines = []
    for steps, workload in CASES:
        for slo in SLOS:
            name, gain = _best(rows, steps, workload, slo)
            lines.append(
                (f"{steps.name}, {workload}, {SHORT[slo.name]}", name, str(gain), _verdict(gain))
            )
    header = ("case", "best split", "goodput more, as a load", "the split")
    return Table("The best of the splits against colocated", header, tuple(lines))


def _reading(rows: Sequence[dict[str, Any]]) -> list[str]:
    found: dict[str, list[str]] = {"pays": [], "loses": [], "not told apart": []}
    for steps, workload in CASES:
        for slo in SLOS:
            name, gain = _best(rows, steps, workload, slo)
            text = f"{steps.name}, {workload}, {SHORT[slo.name]} ({name}, {gain})"
            found[_verdict(gain)].append(text)
    return [
        f"The best split has more goodput than four colocated ranks in {len(found['pays'])} of "
        f"{len(CASES) * len(SLOS)} cases: {'; '.join(found['pays']) or 'none'}.",
        f"It has less in {len(found['loses'])}: {'; '.join(found['loses']) or 'none'}.",
        f"In {len(found['not told apart'])} the interval holds zero: "
        f"{'; '.join(found['not told apart']) or 'none'}.",
        _span(rows),
        "A ring makes a long prompt itself faster, which colocated ranks cannot; what splitting "
        "alone is worth, `3 prefill + 1 decode` beside `ring of 3 + 1 decode` says. Prefill and "
        "decode pools also order their prompts differently (a prefill pool lets short ones pass); "
        "that is in the difference, too.",
        _lightest(rows),
        "What is not in it: pools that change roles with the load, long runs (a run is 40 to 80 "
        "requests, so an overloaded pool is seen while its queue grows; a goodput of "
        f"{LOADS[-1]:g} may be more), and a slow hand-off: its "
        "cost here is the exposed time that the hand-off's own measurement found.",
    ]


def _span(rows: Sequence[dict[str, Any]]) -> str:
    gains = []
    for steps, workload in CASES:
        for slo in SLOS:
            base = goodputs(rows, steps.name, workload, BASELINE, slo.name)
            for name in SPLITS:
                gain = difference(goodputs(rows, steps.name, workload, name, slo.name), base)
                what = f"{gain} ({name}; {steps.name}, {workload}, {SHORT[slo.name]})"
                gains.append((gain.value, what))
    return (
        "The right split depends on the traffic: of all splits and cases the best difference is "
        f"{max(gains)[1]}, the worst {min(gains)[1]}. The best one is named here after the fact, "
        "which favours splitting."
    )


def _lightest(rows: Sequence[dict[str, Any]]) -> str:
    where = {"machine": MEASURED.name, "workload": "mixed", "load": LOADS[0]}
    slo = SLOS[-1].name
    shares = [mean_of(pick(rows, slo, configuration=name, **where)) for name in CONFIGURATIONS]
    cells = ", ".join(
        f"{name} {share.value:.0%}" for name, share in zip(CONFIGURATIONS, shares, strict=True)
    )
    return (
        f"Even at a load of {LOADS[0]:g}, measured machine, mixed, the share of requests without a "
        f"stall and in time is: {cells}."
    )


def _draw(rows: Sequence[dict[str, Any]], figure: Any) -> None:  # noqa: ANN401 - matplotlib's
    shown = (SLOS[0], SLOS[-1])
    grid = figure.subplots(len(shown), len(CASES), sharex=True, sharey=True)
    for line, slo in enumerate(shown):
        for column, (steps, workload) in enumerate(CASES):
            axes = grid[line, column]
            where = {"machine": steps.name, "workload": workload}
            for colour, name in zip(COLOURS, CONFIGURATIONS, strict=False):
                found = [
                    mean_of(pick(rows, slo.name, load=load, configuration=name, **where))
                    for load in LOADS
                ]
                low = [max(0.0, f.low) for f in found]
                high = [min(1.0, f.high) for f in found]
                axes.plot(LOADS, [f.value for f in found], marker="o", markersize=4, color=colour,
                          label=name)  # fmt: skip
                axes.fill_between(LOADS, low, high, color=colour, alpha=0.1)
            axes.axhline(TARGET, color="#888888", linewidth=0.8, linestyle="--")
            if line == 0:
                axes.set_title(f"{steps.name}, {workload}")
        grid[line, 0].set_ylabel(f"share in time\n{slo.name}")
    for axes in grid[-1]:
        axes.set_xlabel("offered load")
    grid[0, 0].set_ylim(0, 1.03)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=len(CONFIGURATIONS), frameon=False)  # fmt: skip
