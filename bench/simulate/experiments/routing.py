"""Who gets the next request: the production placement beside two simple rules.

All know the same requests and prefixes; only the choice of the decode pool differs. The workers are
whole colocated pools of different speed; prompts share prefixes as popular as Zipf says, and no
worker can keep them all.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from bench.load.analysis.metrics import e2e_of, ttft_of
from bench.load.workload.lengths import count_of
from bench.load.workload.schedule import Schedule
from bench.load.workload.sessions import Segment, Turn
from bench.report.drawing.plot import Axis, Dot, Dots, Lanes, Layer, Plot, Rule, Whiskers
from bench.simulate.driver import ClusterSetting, MakePlacement, VirtualCluster, serve
from bench.simulate.estimates import Estimate, mean_of, pick, ratio, tail
from bench.simulate.pools import BLOCK_SIZE, DecodeSetting
from bench.simulate.report import NullCase, Report, Scale, Table
from bench.simulate.step_time import MEASURED, ROOFLINE, StepTime
from bench.simulate.workload import lengths, traffic
from coordinator.cluster.placement import Placement
from coordinator.cluster.pools import Pool
from coordinator.cluster.registry import Registry
from coordinator.config import CoordinatorConfig
from coordinator.request import Loads, Request

NAME = "routing"
PRODUCTION, BASELINE = "production", "least tokens"
NUM_PREFIXES, PREFIX_TOKENS = 24, 512
OWN, OUTPUT, MEAN = lengths(48, 0.5), lengths(48, 0.7), 48
NUM_REQUESTS = 250
CASES = ((0.5, 1.0), (0.8, 1.0), (0.8, 2.5))  # (load, exponent of the prefixes' popularity)
HETEROGENEOUS = (1.0, 1.0, 1.5, 3.0)  # how many times as long a step takes on each worker
EQUAL = (1.0, 1.0, 1.0, 1.0)
MACHINES: tuple[StepTime, ...] = (MEASURED, ROOFLINE)
NUM_BLOCKS = 12 * PREFIX_TOKENS // BLOCK_SIZE + 256  # a worker keeps about half of the prefixes
BATCH = 32
FIGURES = {"ttft_mean_s": "mean TTFT", "ttft_p99_s": "p99 TTFT", "e2e_mean_s": "mean E2E"}
Rows = list[dict[str, Any]]


class LeastTokens(Placement):
    """The decode pool with the fewest tokens still to compute; all else is the coordinator's."""

    def __init__(self, config: CoordinatorConfig, registry: Registry) -> None:
        super().__init__(config, registry)
        self._workers = registry

    def choose_decode(self, request: Request, loads: Loads, now: float) -> str | None:
        del now

        def wait(pool: Pool) -> tuple[int, int]:
            return self.counts(pool, request), loads.decode_tokens(pool.pool_id)

        return min(self._workers.serving("decode"), key=wait).pool_id

    def counts(self, pool: Pool, request: Request) -> int:
        """What comes before the load."""
        del pool, request
        return 0


class PrefixOnly(LeastTokens):
    """The most cached prefix, whatever the wait there is; the fewest tokens among equals."""

    def counts(self, pool: Pool, request: Request) -> int:
        return -self.num_cached(pool, request.block_hashes)


POLICIES: dict[str, MakePlacement | None] = {
    BASELINE: LeastTokens,
    "prefix only": PrefixOnly,
    PRODUCTION: None,
}


@dataclass(frozen=True, slots=True)
class Shared:
    """Prompts that begin with one of some prefixes; an exponent of 0 makes all as popular."""

    num_tokens: int
    exponent: float

    def sessions(self, random: Random) -> Iterator[tuple[Turn, ...]]:
        own, output = count_of(OWN), count_of(OUTPUT)
        weights = [(rank + 1) ** -self.exponent for rank in range(NUM_PREFIXES)]
        number = 0
        while True:
            prefix = random.choices(range(NUM_PREFIXES), weights)[0]
            segments = [Segment(f"request/{number}", own(random))]
            if self.num_tokens:
                segments.insert(0, Segment(f"prefix/{prefix}", self.num_tokens))
            yield (Turn("chat", tuple(segments), output(random)),)
            number += 1


def capacity(steps: StepTime, slowness: Sequence[float], prefix_tokens: int) -> float:
    """Requests a second of workers that are always full and hit every prefix half of the time."""
    step_s = steps.step_s(BATCH, BATCH * (prefix_tokens + 100), [])
    work_s = steps.step_s(0, 0, [(prefix_tokens // 2 + MEAN, 0)]) + MEAN * step_s / BATCH
    return sum(1 / slower for slower in slowness) / work_s


def setting(steps: StepTime, slowness: Sequence[float]) -> ClusterSetting:
    decode = (DecodeSetting(num_blocks=NUM_BLOCKS, slowness=slower) for slower in slowness)
    return ClusterSetting(steps, tuple(decode))


def figures(cluster: VirtualCluster, schedule: Schedule, prefix_tokens: int) -> dict[str, float]:
    records = serve(cluster, schedule)
    ttfts = [ttft_of(record) or 0.0 for record in records]
    cached = sum(record.num_cached_tokens or 0 for record in records)
    busy = cluster.busy_s("decode")
    return {
        "ttft_mean_s": statistics.fmean(ttfts),
        "ttft_p99_s": tail(ttfts),
        "e2e_mean_s": statistics.fmean(e2e_of(record) or 0.0 for record in records),
        "hit_rate": cached / max(1, prefix_tokens * len(records)),
        "imbalance": max(busy) / statistics.fmean(busy),
    }


def compare(
    steps: StepTime,
    slowness: Sequence[float],
    case: tuple[float, float],
    scale: Scale,
    prefix_tokens: int = PREFIX_TOKENS,
) -> Iterator[dict[str, Any]]:
    """All policies on the same traffic."""
    load, exponent = case
    rate = load * capacity(steps, slowness, prefix_tokens)
    for seed in scale.seeds:
        schedule = traffic(
            Shared(prefix_tokens, exponent), rate, seed, scale.count(NUM_REQUESTS, 30)
        )
        for name, policy in POLICIES.items():
            chosen = replace(setting(steps, slowness), make_placement=policy)
            yield {
                "machine": steps.name,
                "load": load,
                "exponent": exponent,
                "workers": len(slowness),
                "prefix_tokens": prefix_tokens,
                "seed": seed,
                "policy": name,
                **figures(VirtualCluster(chosen), schedule, prefix_tokens),
            }


def null_cases(scale: Scale) -> list[NullCase]:
    """One worker: there is no choice. Equal workers and nothing shared: load is all there is."""
    rows = list(compare(MEASURED, (1.0,), CASES[0], scale))
    means = [pick(rows, "e2e_mean_s", policy=name) for name in POLICIES]
    spread = max(max(values) / min(values) - 1 for values in zip(*means, strict=True))
    rows = list(compare(MEASURED, EQUAL, CASES[0], scale, 0))
    found = over_baseline(rows, "e2e_mean_s", PRODUCTION)
    return [
        NullCase(
            "one worker, time to the last token under all policies",
            f"differs by {spread:.2%}",
            spread < 1e-9,
        ),
        NullCase(
            f"equal workers and no shared prefix, production over {BASELINE}, time to the last "
            "token",
            str(found),
            not found.excludes(1.0) or abs(found.value - 1) < 0.02,
        ),
    ]


def over_baseline(rows: Rows, figure: str, policy: str, **where: object) -> Estimate:
    """Against the least tokens, which is no weak policy."""
    return ratio(*(pick(rows, figure, policy=name, **where) for name in (policy, BASELINE)))


def run(scale: Scale) -> Report:
    """All of it."""
    rows = [
        row
        for steps in MACHINES
        for case in CASES
        for row in compare(steps, HETEROGENEOUS, case, scale)
    ]
    return Report(
        name=NAME,
        question="What is the production router worth against simpler policies?",
        setting=[
            f"Four colocated workers whose steps take {', '.join(map(str, HETEROGENEOUS))} times "
            f"as long; {NUM_PREFIXES} prefixes of {PREFIX_TOKENS} tokens, of which a worker can "
            "keep about half; some 48 tokens of their own, answers of 48. Poisson.",
            "Zipf 1: the most popular prefix is in a quarter of the prompts; Zipf 2.5: in three "
            "quarters.",
            "Load 1 is what the workers can do when they are full and hit half of all prefixes.",
            "What is cached is known without delay.",
            *(f"`{steps.name}`: {steps.source}." for steps in MACHINES),
        ],
        tables=[_table(rows, steps, case) for steps in MACHINES for case in CASES],
        nulls=null_cases(Scale(scale.num_seeds, scale.size / 2)),
        reading=_reading(rows),
        rows=rows,
        plots=[_plot(rows, steps) for steps in MACHINES],
    )


def _where(steps: StepTime, case: tuple[float, float]) -> dict[str, object]:
    return {"machine": steps.name, "load": case[0], "exponent": case[1]}


def _table(rows: Rows, steps: StepTime, case: tuple[float, float]) -> Table:
    where = _where(steps, case)
    lines = []
    for name in POLICIES:
        ratios = [str(over_baseline(rows, figure, name, **where)) for figure in FIGURES]
        hit, skew = (
            mean_of(pick(rows, figure, policy=name, **where)).value
            for figure in ("hit_rate", "imbalance")
        )
        mean = mean_of(pick(rows, "ttft_mean_s", policy=name, **where))
        lines.append((name, str(mean), *ratios, f"{hit:.0%}", f"{skew:.2f}"))
    over = [f"{words} over {BASELINE}" for words in FIGURES.values()]
    header = ("policy", "mean TTFT (s)", *over, "prefix hit", "busiest / mean")
    return Table(f"{steps.name}, load {case[0]:g}, Zipf {case[1]:g}", header, lines)


def _reading(rows: Rows) -> list[str]:
    lines = []
    for steps in MACHINES:
        for case in CASES:
            ttft, p99, whole = (
                over_baseline(rows, figure, PRODUCTION, **_where(steps, case)) for figure in FIGURES
            )
            lines.append(
                f"`{steps.name}`, load {case[0]:g}, Zipf {case[1]:g}: production has {ttft} times "
                f"the mean TTFT of {BASELINE}, {p99} times its p99 and {whole} times its mean time "
                "to the last token."
            )
    return [
        *lines,
        "Not shown: stale knowledge of loads and caches, sessions, failures, and a burst of one "
        "new prefix, which the rule must send to one worker as soon as that one has it.",
    ]


def _plot(rows: Rows, steps: StepTime) -> Plot:
    names = [name for name in POLICIES if name != BASELINE]
    lanes: list[str] = []
    dots: dict[str, list[Dot]] = {}
    whiskers: list[tuple[int, float, float]] = []
    for case in CASES:
        for name in names:
            found = over_baseline(rows, "ttft_mean_s", name, **_where(steps, case))
            lane = len(lanes)
            lanes.append(f"load {case[0]:g}, Zipf {case[1]:g}, {name}")
            dots.setdefault(name, []).append(Dot(found.value, float(lane), str(found)))
            whiskers.append((lane, found.low, found.high))
    layers: list[Layer] = [Whiskers(tuple(whiskers))]
    layers += [Dots(name, color, tuple(own)) for color, (name, own) in enumerate(dots.items())]
    return Plot(
        f"routing-{steps.name}",
        f"Mean TTFT over {BASELINE}: {steps.name} (simulated)",
        Axis("ratio", log=True),
        Lanes(tuple(lanes)),
        (*layers, Rule(1.0, BASELINE, vertical=True)),
    )
