"""Split or not: the same four ranks as one kind of pool, or as prefill and decode pools.

Attainment is the share of requests that meet a deadline for the first token, which grows with the
prompt, and a limit between tokens. Goodput is the largest offered load at which at least nine in
ten do. The traffic comes open loop at each load; all ranks are counted, idle ones too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.load.analysis.metrics import e2e_of, gaps_of, ttft_of
from bench.load.analysis.slo import tpot_of
from bench.load.record import RequestRecord
from bench.load.workload.schedule import Schedule
from bench.load.workload.sessions import Lengths
from bench.report.drawing.plot import Axis, Plot, Rule
from bench.simulate.driver import ClusterSetting, serve
from bench.simulate.estimates import Estimate, difference, mean_of, pick
from bench.simulate.pools import DecodeSetting, PrefillSetting
from bench.simulate.report import NullCase, Report, Scale, Table, curves
from bench.simulate.step_time import MEASURED, ROOFLINE, StepTime
from bench.simulate.workload import Blend, traffic

NAME = "disaggregation"
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
Rows = list[dict[str, Any]]


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

    def is_met(self, steps: StepTime, record: RequestRecord) -> bool:
        step_s = steps.step_s(BATCH, BATCH * 256, [])
        alone_s = steps.chunk_s(record.num_prompt_tokens, 0, 1)
        return (
            (ttft_of(record) or 0.0) <= self.prefill * alone_s + 10 * step_s
            and (tpot_of(record) or 0.0) <= self.tpot * step_s
            and max(gaps_of(record), default=0.0) <= self.stall * step_s
        )


SLOS = (
    Slo("relaxed: TPOT 4 steps", tpot=4.0),
    Slo("strict: TPOT 1.5 steps", tpot=1.5),
    Slo("no stall: no gap of 8 steps", tpot=4.0, stall=8.0),
)


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests of one kind: their share of the mixed traffic, and means of their lengths."""

    share: float
    prompt: float
    output: float

    def workload(self, name: str) -> Lengths:
        prompt, output = (f"uniform/{m / 2:g}/{m * 1.5:g}" for m in (self.prompt, self.output))
        return Lengths(prompt, output, name)


def kinds(steps: StepTime, workload: str) -> dict[str, Kind]:
    """What a workload consists of; the roofline's prompts are longer, as its ranks are faster."""
    found = {
        "chats": Kind(0.7, 64, 64),
        "documents": Kind(0.3, 2048 if steps is MEASURED else 8192, 16),
    }
    return found if workload == "mixed" else {workload: found[workload]}


CASES: tuple[tuple[StepTime, str], ...] = (
    (MEASURED, "mixed"),
    (ROOFLINE, "mixed"),
    (MEASURED, "chats"),
    (MEASURED, "documents"),
)


def capacity(steps: StepTime, workload: str) -> float:
    """Requests a second of four colocated ranks that are never idle, with batches of eight."""
    own = kinds(steps, workload).values()
    step_s = steps.step_s(BATCH, BATCH * 256, [])
    work_s = sum(
        kind.share * (steps.chunk_s(round(kind.prompt), 0, 1) + kind.output * step_s / BATCH)
        for kind in own
    )
    return NUM_RANKS * sum(kind.share for kind in own) / work_s


def setting(steps: StepTime, configuration: str) -> ClusterSetting:
    num_decode, rings = CONFIGURATIONS[configuration]
    decode = DecodeSetting(512, 64, num_blocks=1 << 14)
    prefill = tuple(PrefillSetting(cp_size, num_blocks=1 << 14) for cp_size in rings)
    return ClusterSetting(steps, (decode,) * num_decode, prefill)


def asked(steps: StepTime, workload: str, load: float, seed: int, num: int) -> Schedule:
    own = kinds(steps, workload)
    blend = Blend([(kind.share, kind.workload(name)) for name, kind in own.items()])
    return traffic(blend, load * capacity(steps, workload), seed, num)


def attainments(
    steps: StepTime, workload: str, scale: Scale, loads: Sequence[float] = LOADS
) -> Iterator[dict[str, Any]]:
    """Shares of requests in time, by load."""
    num = scale.count(NUM_REQUESTS[workload], 20)
    for seed in scale.seeds:
        for load in loads:
            schedule = asked(steps, workload, load, seed, num)
            for configuration in CONFIGURATIONS:
                records = serve(setting(steps, configuration), schedule)
                met = {
                    slo.name: sum(slo.is_met(steps, one) for one in records) / num for slo in SLOS
                }
                yield {
                    "machine": steps.name,
                    "workload": workload,
                    "seed": seed,
                    "load": load,
                    "configuration": configuration,
                    **met,
                }


def goodput(loads: Sequence[float], shares: Sequence[float], target: float = TARGET) -> float:
    """The load at which attainment first falls below the target, linear between the points."""
    before_load, before = 0.0, 1.0
    for load, share in zip(loads, shares, strict=True):
        if share < target:
            return before_load + (load - before_load) * (before - target) / (before - share)
        before_load, before = load, share
    return before_load


def goodputs(rows: Rows, case: tuple[StepTime, str], configuration: str, slo: Slo) -> list[float]:
    """Of each seed."""
    where = {"machine": case[0].name, "workload": case[1], "configuration": configuration}
    seeds = sorted({row["seed"] for row in rows})
    return [goodput(LOADS, pick(rows, slo.name, seed=seed, **where)) for seed in seeds]


def null_case(scale: Scale) -> NullCase:
    """Chats one at a time: nobody is in anybody's way, so there is nothing to separate."""
    ratios = []
    for seed in scale.seeds:
        schedule = asked(MEASURED, "chats", NULL_LOAD, seed, scale.count(40, 10))
        runs = [serve(setting(MEASURED, name), schedule) for name in CONFIGURATIONS]
        times = [sum(e2e_of(one) or 0.0 for one in records) for records in runs]
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
        question="At equal ranks, where does splitting prefill from decode pay, and where not?",
        setting=[
            "Four ranks in each configuration; the production router and the production rule on "
            "who computes a prompt (up to 128 new tokens the decode pool does).",
            "Chats: prompts of 64 tokens, answers of 64. Documents: prompts of 2048 (measured) or "
            "8192 (roofline), answers of 16; half to one and a half of that. Mixed: 7 chats to 3 "
            "documents. Poisson.",
            "Load 1 is what four colocated ranks could do that are never idle and always full.",
            "First token within 3 times the prompt's time alone on a rank and ten steps; a step is "
            f"that of {BATCH} sequences. Goodput: load at which {TARGET:.0%} are in time.",
            *(f"`{steps.name}`: {steps.source}." for steps in (MEASURED, ROOFLINE)),
        ],
        tables=[_verdicts(rows), *(_table(rows, slo) for slo in SLOS)],
        nulls=[null_case(scale)],
        reading=_reading(rows),
        rows=rows,
        plots=[_plot(rows, case, SLOS[-1]) for case in CASES],
    )


def _named(case: tuple[StepTime, str]) -> str:
    return f"{case[0].name}, {case[1]}"


def _gain(rows: Rows, case: tuple[StepTime, str], split: str, slo: Slo) -> Estimate:
    return difference(*(goodputs(rows, case, name, slo) for name in (split, BASELINE)))


def _table(rows: Rows, slo: Slo) -> Table:
    lines = []
    for case in CASES:
        cells = [str(mean_of(goodputs(rows, case, name, slo))) for name in CONFIGURATIONS]
        gains = [str(_gain(rows, case, name, slo)) for name in SPLITS]
        lines.append((_named(case), *cells, *gains))
    header = ("case", *CONFIGURATIONS, *(f"{name}, more" for name in SPLITS))
    return Table(f"Goodput as a load; {slo.name}", header, lines)


def _best(rows: Rows, case: tuple[StepTime, str], slo: Slo) -> tuple[str, Estimate]:
    """The split with the most goodput, and how much more it has than colocated."""
    gains = {name: _gain(rows, case, name, slo) for name in SPLITS}
    best = max(SPLITS, key=lambda name: gains[name].value)
    return best, gains[best]


def _verdict(gain: Estimate) -> str:
    if not gain.excludes(0.0):
        return "not told apart"
    return "pays" if gain.value > 0 else "loses"


def _verdicts(rows: Rows) -> Table:
    lines = []
    for case in CASES:
        for slo in SLOS:
            name, gain = _best(rows, case, slo)
            what = f"{_named(case)}, {slo.name.partition(':')[0]}"
            lines.append((what, name, str(gain), _verdict(gain)))
    header = ("case", "best split", "goodput more, as a load", "the split")
    return Table("The best of the splits against colocated", header, lines)


def _reading(rows: Rows) -> list[str]:
    verdicts = [row[-1] for row in _verdicts(rows).rows]
    counts = {word: verdicts.count(word) for word in ("pays", "loses", "not told apart")}
    return [
        f"Of {len(verdicts)} cases the best split pays in {counts['pays']}, loses in "
        f"{counts['loses']}, and in {counts['not told apart']} the interval holds zero. The best "
        "one is named here after the fact, which favours splitting.",
        "A ring makes a long prompt itself faster, which colocated ranks cannot; what splitting "
        "alone is worth, `3 prefill + 1 decode` beside `ring of 3 + 1 decode` says. Prefill and "
        "decode pools also order their prompts differently (a prefill pool lets short ones pass); "
        "that is in the difference, too.",
        "What is not in it: pools that change roles with the load, long runs (a run is 40 to 80 "
        "requests, so an overloaded pool is seen while its queue grows; a goodput of "
        f"{LOADS[-1]:g} may be more), and a slow hand-off: its cost here is the exposed time that "
        "the hand-off's own measurement found.",
    ]


def _plot(rows: Rows, case: tuple[StepTime, str], slo: Slo) -> Plot:
    where = {"machine": case[0].name, "workload": case[1]}
    found = {
        name: [
            (load, mean_of(pick(rows, slo.name, load=load, configuration=name, **where)))
            for load in LOADS
        ]
        for name in CONFIGURATIONS
    }
    return curves(
        f"disaggregation-{case[0].name}-{case[1]}",
        f"Requests in time: {_named(case)}, {slo.name}",
        (Axis("offered load", low=0.0), Axis("share in time", "share", low=0.0, high=1.0)),
        found,
        Rule(TARGET, f"target {TARGET:.0%}"),
    )
