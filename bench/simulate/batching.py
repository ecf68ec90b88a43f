"""What continuous batching is worth, as a function of how much the lengths of answers vary.

Static batching is a policy around the real scheduler: a batch is formed, let in at once, and nobody
follows until all of it has ended. *Static* waits for a full batch, *dynamic* for a full batch or
for a while at most; *continuous* is the scheduler as it is. All else is the same.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from bench.simulate.cluster import Cluster, ClusterSetting, Gate, Served
from bench.simulate.estimates import Estimate, mean_of, percentile, pick, ratio, short
from bench.simulate.pools import DecodeSetting, seeded
from bench.simulate.report import COLOURS, VIRTUAL, NullCase, Report, Scale, Table
from bench.simulate.step_time import MEASURED, ROOFLINE, StepTime
from bench.simulate.workload import Arrival, Lengths, Mix, draw
from tests.simulation.world import EventLoop

NAME = "batching"
QUESTION = "What is continuous batching worth, by how much the lengths of answers vary?"
CVS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
NUM_SLOTS = 16
PROMPT_TOKENS = 16  # all slots' prompts fit into one step, so that constant lengths stay in step
MEAN_OUTPUT = 128
NUM_BATCHES = 12
WINDOW_STEPS = 20  # dynamic batching waits for so many steps' time at most
OVERLOAD, LIGHT = 20.0, 0.5  # offered, as shares of what the engine can do at constant lengths
POLICIES = ("continuous", "dynamic", "static")


class BatchGate:
    """Forms batches.

    Args:
        world: its clock.
        admit: lets a request in.
        size: of a full batch.
        window_s: after which a batch that is not full goes as well.
        num_coming: requests in all: when the last has come, nobody waits for more.
    """

    def __init__(
        self,
        world: EventLoop,
        admit: Callable[[Served], None],
        *,
        size: int,
        window_s: float,
        num_coming: int,
    ) -> None:
        self._world = world
        self._admit = admit
        self._size = size
        self._window_s = window_s
        self._num_coming = num_coming
        self._waiting: deque[Served] = deque()
        self._num_inside = 0

    def arrive(self, served: Served) -> None:
        self._num_coming -= 1
        self._waiting.append(served)
        if self._window_s < float("inf"):
            self._world.at(self._window_s, self._consider)
        self._consider()

    def leave(self, served: Served) -> None:
        del served
        self._num_inside -= 1
        self._consider()

    def _consider(self) -> None:
        if self._num_inside or not self._waiting:
            return
        # The sum, not the difference: that is what the alarm was set to.
        is_late = self._world.now >= self._waiting[0].arrival.time_s + self._window_s
        if len(self._waiting) >= self._size or is_late or self._num_coming == 0:
            batch = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
            self._num_inside = len(batch)
            for served in batch:
                self._admit(served)


def make_gate(policy: str, steps: StepTime, num_coming: int) -> Callable[[Cluster], Gate] | None:
    """The gate of a policy; None is the open one."""
    if policy == "continuous":
        return None
    window_s = float("inf")
    if policy == "dynamic":
        window_s = WINDOW_STEPS * steps.step_s(NUM_SLOTS, NUM_SLOTS * MEAN_OUTPUT, [])

    def make(cluster: Cluster) -> Gate:
        return BatchGate(
            cluster.world, cluster.admit, size=NUM_SLOTS, window_s=window_s, num_coming=num_coming
        )

    return make


def capacity_rate(steps: StepTime) -> float:
    """Requests a second that full slots serve when all answers are of the mean length."""
    step_s = steps.step_s(NUM_SLOTS, NUM_SLOTS * (PROMPT_TOKENS + MEAN_OUTPUT // 2), [])
    return NUM_SLOTS / (MEAN_OUTPUT * step_s)


def traffic(steps: StepTime, cv: float, seed: int, load: float, num: int) -> list[Arrival]:
    mix = Mix("chat", 1.0, Lengths(PROMPT_TOKENS, 0), Lengths(MEAN_OUTPUT, cv, 4096))
    return draw(seeded(NAME, cv, seed, load), load * capacity_rate(steps), num, [mix])


def serve(steps: StepTime, policy: str, arrivals: Sequence[Arrival]) -> list[Served]:
    """One run."""
    decode = DecodeSetting(token_budget=512, max_num_sequences=NUM_SLOTS)
    gate = make_gate(policy, steps, len(arrivals))
    return Cluster(ClusterSetting(steps, (decode,)), gate).run(arrivals)


def steady(served: Sequence[Served]) -> tuple[float, float]:
    """From the moment at which all slots were first taken to the last one at which one was given.

    Between them there was always somebody waiting; neither start nor drain counts.
    """
    granted = sorted(one.granted_s for one in served)
    return granted[NUM_SLOTS - 1], granted[-1]


def throughput(served: Sequence[Served]) -> float:
    """Tokens a second, while it is steady."""
    first_s, last_s = steady(served)
    moments = (moment for one in served for moment in one.token_times_s)
    return sum(first_s < moment <= last_s for moment in moments) / (last_s - first_s)


def occupied_slots(served: Sequence[Served]) -> float:
    """Share of the slots' time in which they held a request, while it is steady."""
    first_s, last_s = steady(served)
    held_s = (
        max(0.0, min(one.token_times_s[-1], last_s) - max(one.granted_s, first_s)) for one in served
    )
    return sum(held_s) / (NUM_SLOTS * (last_s - first_s))


def longest_over_mean(arrivals: Sequence[Arrival]) -> float:
    """What continuous batching would gain if a step cost the same however few are in it."""
    lengths = [arrival.num_output_tokens for arrival in arrivals]
    batches = [lengths[i : i + NUM_SLOTS] for i in range(0, len(lengths), NUM_SLOTS)]
    return sum(map(max, batches)) / (sum(lengths) / NUM_SLOTS)


def saturated(steps: StepTime, cv: float, scale: Scale) -> Iterator[dict[str, Any]]:
    """Throughput and occupied slots of both, with more coming than can be served."""
    num = NUM_SLOTS * scale.count(NUM_BATCHES, 3)
    for seed in scale.seeds:
        arrivals = traffic(steps, cv, seed, OVERLOAD, num)
        for policy in ("continuous", "static"):
            served = serve(steps, policy, arrivals)
            yield {
                "part": "saturated", "machine": steps.name, "cv": cv, "seed": seed,
                "policy": policy, "tokens_per_s": throughput(served),
                "occupied_slots": occupied_slots(served),
                "longest_over_mean": longest_over_mean(arrivals),
            }  # fmt: skip


def light(steps: StepTime, cv: float, scale: Scale) -> Iterator[dict[str, Any]]:
    """What it does to who waits, at half load."""
    num = NUM_SLOTS * scale.count(NUM_BATCHES, 3)
    for seed in scale.seeds:
        arrivals = traffic(steps, cv, seed, LIGHT, num)
        for policy in POLICIES:
            served = serve(steps, policy, arrivals)
            ttfts = [one.ttft_s for one in served]
            yield {
                "part": "light", "machine": steps.name, "cv": cv, "seed": seed, "policy": policy,
                "ttft_p50_s": percentile(ttfts, 0.5), "ttft_p99_s": percentile(ttfts, 0.99),
                "e2e_p50_s": percentile([one.e2e_s for one in served], 0.5),
            }  # fmt: skip


def gain(rows: Sequence[dict[str, Any]], machine: str, cv: float) -> Estimate:
    """Continuous over static throughput."""
    found = [
        pick(rows, "tokens_per_s", part="saturated", machine=machine, cv=cv, policy=policy)
        for policy in ("continuous", "static")
    ]
    return ratio(*found)


def run(scale: Scale) -> Report:
    """All of it."""
    rows: list[dict[str, Any]] = []
    for steps in (MEASURED, ROOFLINE):
        for cv in CVS:
            rows += saturated(steps, cv, scale)
    for cv in CVS:
        rows += light(MEASURED, cv, scale)
    return Report(
        name=NAME,
        question=QUESTION,
        clock=VIRTUAL,
        setting=[
            f"{NUM_SLOTS} slots, prompts of {PROMPT_TOKENS} tokens, answers of {MEAN_OUTPUT} on "
            f"average, log-normal; Poisson arrivals at {OVERLOAD:g} and {LIGHT:g} times capacity.",
            *(f"`{steps.name}`: {steps.source}." for steps in (MEASURED, ROOFLINE)),
        ],
        tables=[_throughput_table(rows), _latency_table(rows)],
        nulls=[null_case(rows)],
        reading=_reading(rows),
        rows=rows,
        draw=partial(_draw, rows),
    )


def null_case(rows: Sequence[dict[str, Any]]) -> NullCase:
    """Answers of one length: a batch ends as a whole, and there is nothing to fill."""
    found = [gain(rows, machine, 0.0) for machine in (MEASURED.name, ROOFLINE.name)]
    return NullCase(
        "answers of one length, throughput continuous over static",
        " and ".join(short(one.value) for one in found),
        all(abs(one.value - 1) < 0.02 for one in found),
    )


def _throughput_table(rows: Sequence[dict[str, Any]]) -> Table:
    lines = []
    for cv in CVS:
        bound = mean_of(pick(rows, "longest_over_mean", cv=cv, policy="static", machine="roofline"))
        occupied = [
            mean_of(pick(rows, "occupied_slots", cv=cv, policy=policy, machine=MEASURED.name))
            for policy in ("continuous", "static")
        ]
        gains = [str(gain(rows, machine, cv)) for machine in (MEASURED.name, ROOFLINE.name)]
        shares = [f"{one.value:.0%}" for one in occupied]
        lines.append((f"{cv:g}", *gains, str(bound), *shares))
    header = [
        "CV of lengths",
        "gain, measured",
        "gain, roofline",
        "longest / mean",
        "slots filled, continuous",
        "slots filled, static",
    ]
    return Table("Saturated: throughput, continuous over static", header, tuple(lines))


def _latency_table(rows: Sequence[dict[str, Any]]) -> Table:
    lines = []
    for cv in CVS:
        cells = [f"{cv:g}"]
        for figure in ("ttft_p50_s", "ttft_p99_s"):
            for policy in POLICIES:
                found = mean_of(pick(rows, figure, part="light", cv=cv, policy=policy))
                cells.append(short(found.value))
        lines.append(tuple(cells))
    header = ("CV of lengths", *(f"p50 {p}" for p in POLICIES), *(f"p99 {p}" for p in POLICIES))
    return Table("Half load, measured machine: seconds to the first token", header, tuple(lines))


def _reading(rows: Sequence[dict[str, Any]]) -> list[str]:
    low, high = (gain(rows, MEASURED.name, cv) for cv in (CVS[1], CVS[-1]))
    high_roofline = gain(rows, ROOFLINE.name, CVS[-1])
    bound = mean_of(
        pick(rows, "longest_over_mean", cv=CVS[-1], policy="static", machine=ROOFLINE.name)
    )
    waits = [
        mean_of(pick(rows, "ttft_p50_s", part="light", cv=1.0, policy=policy)).value
        for policy in POLICIES
    ]
    return [
        f"There is no one figure: from CV {CVS[1]:g} to {CVS[-1]:g} the gain in throughput goes "
        f"from {low} to {high} on the measured machine, and reaches {high_roofline} on the "
        "roofline.",
        f"It stays below what the longest answer of a batch over the mean says ({bound} at CV "
        f"{CVS[-1]:g}): a step with few sequences is cheaper, most of all on a CPU, where static "
        "batching wastes less than on an accelerator.",
        f"At half load and CV 1 half of the requests wait {short(waits[0])} s for their first "
        f"token with continuous, {short(waits[1])} s with dynamic and {short(waits[2])} s with "
        "static batching: what a batch costs is waiting. (Half of what continuous batching can do "
        "is more than static batching can wherever the gain is above 2.)",
        "Not shown: long prompts. Their chunks slow the decoding neighbours under continuous "
        "batching and under a static batch alike; the experiment `budgets` is about that.",
    ]


def _draw(rows: Sequence[dict[str, Any]], figure: Any) -> None:  # noqa: ANN401 - matplotlib's
    left, right = figure.subplots(1, 2)
    for colour, machine in zip(COLOURS, (MEASURED.name, ROOFLINE.name), strict=False):
        gains = [gain(rows, machine, cv) for cv in CVS]
        errors = [[g.value - g.low for g in gains], [g.high - g.value for g in gains]]
        left.errorbar(CVS, [g.value for g in gains], errors, color=colour, marker="o", capsize=3,
                      label=machine)  # fmt: skip
    bounds = [mean_of(pick(rows, "longest_over_mean", cv=cv)).value for cv in CVS]
    left.plot(CVS, bounds, color="#888888", linestyle="--", label="longest of a batch / mean")
    left.axhline(1.0, color="#888888", linewidth=0.8)
    left.set(xlabel="CV of the answers' lengths", ylabel="throughput, continuous / static",
             title="saturated")  # fmt: skip
    left.legend(frameon=False, loc="upper left")
    for colour, policy in zip(COLOURS, POLICIES, strict=False):
        for figure_name, style in (("ttft_p50_s", "-"), ("ttft_p99_s", ":")):
            ys = [
                mean_of(pick(rows, figure_name, part="light", cv=cv, policy=policy)).value
                for cv in CVS
            ]
            right.plot(CVS, ys, style, color=colour, marker="o", markersize=4,
                       label=f"{policy} {figure_name[5:8]}")  # fmt: skip
    right.set(xlabel="CV of the answers' lengths", ylabel="time to first token (s)",
              title="half load, measured machine", yscale="log")  # fmt: skip
    right.legend(frameon=False, ncols=3, fontsize=8)
