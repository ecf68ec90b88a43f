"""What a scheduler's own time costs: injected on virtual time, and measured.

1. So many milliseconds are added to every step of the virtual pool, under the same traffic, and
   what becomes of first tokens, gaps and goodput is fitted with a line. The same once a request,
   before it reaches the router, is the null case for the gaps: per step and per request differ by
   as many times as an answer has tokens.
2. The real ``schedule()`` and ``update()`` are timed at several batches and queues, here.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from bench.simulate.cluster import Cluster, ClusterSetting, Gate, Served
from bench.simulate.estimates import Estimate, mean_of, percentile, pick, short, slope
from bench.simulate.pools import (
    FINGERPRINT,
    MAX_MODEL_LEN,
    PLAIN_TOKEN,
    DecodeSetting,
    seeded,
)
from bench.simulate.report import COLOURS, VIRTUAL, NullCase, Report, Scale, Table
from bench.simulate.step_time import MEASURED, ROOFLINE, StepTime
from bench.simulate.workload import Arrival, Lengths, Mix, draw
from decode.batch import SchedulerLimits
from decode.scheduler import DecodeScheduler
from kvcache.blocks import BlockPool
from kvtransfer.events import ControlReceived
from protocol.messages import ComputeHere, Reserve
from protocol.plans import SampledToken, StepResult
from protocol.request import SamplingParams

NAME = "overhead"
QUESTION = "What does a millisecond of scheduling per step cost, and how many are there?"
INJECTED_MS = (0, 1, 5, 10, 20)
NUM_SLOTS = 32
PROMPT, OUTPUT = Lengths(128, 0.5, 500), Lengths(64, 0.7, 512)
LOADS = (0.25, 0.5, 0.75, 1.0)
LATENCY_LOAD = 0.5
NUM_REQUESTS = 120
TTFT_STEPS, TPOT_STEPS, TARGET = 20.0, 2.0, 0.9  # the deadlines, in steps of a full batch
BATCHES, QUEUES = (1, 32, 256), (10, 1000)
NUM_TIMED, NUM_WARM = 300, 40
CONTEXT = 128  # tokens of each sequence when timing starts
MACHINES: tuple[StepTime, ...] = (MEASURED, ROOFLINE)


# -- injected --------------------------------------------------------------------------------------


class LateGate:
    """Lets a request through after a while."""

    def __init__(self, cluster: Cluster, delay_s: float) -> None:
        self._cluster = cluster
        self._delay_s = delay_s

    def arrive(self, served: Served) -> None:
        self._cluster.world.at(self._delay_s, partial(self._cluster.admit, served))

    def leave(self, served: Served) -> None:
        del served


def full_step_s(steps: StepTime) -> float:
    return steps.step_s(NUM_SLOTS, NUM_SLOTS * round(PROMPT.mean + OUTPUT.mean / 2), [])


def capacity(steps: StepTime) -> float:
    """Requests a second of full slots without overhead."""
    prompt_s = steps.step_s(0, 0, [(round(PROMPT.mean), 0)])
    return 1 / (prompt_s + OUTPUT.mean * full_step_s(steps) / NUM_SLOTS)


def traffic(steps: StepTime, load: float, seed: int, num: int) -> list[Arrival]:
    mix = Mix("chat", 1.0, PROMPT, OUTPUT)
    return draw(seeded(NAME, steps.name, load, seed), load * capacity(steps), num, [mix])


def serve(
    steps: StepTime,
    arrivals: Sequence[Arrival],
    overhead_s: float,
    make_gate: Callable[[Cluster], Gate] | None = None,
) -> list[Served]:
    decode = DecodeSetting(512, NUM_SLOTS, overhead_s=overhead_s)
    return Cluster(ClusterSetting(steps, (decode,)), make_gate).run(arrivals)


def is_good(steps: StepTime, served: Served) -> bool:
    step_s = full_step_s(steps)
    return served.ttft_s <= TTFT_STEPS * step_s and served.tpot_s <= TPOT_STEPS * step_s


def inject(steps: StepTime, scale: Scale) -> Iterator[dict[str, Any]]:
    """Part 1."""
    num = scale.count(NUM_REQUESTS, 30)
    for seed in scale.seeds:
        for load in LOADS:
            arrivals = traffic(steps, load, seed, num)
            for overhead_ms in INJECTED_MS:
                served = serve(steps, arrivals, overhead_ms / 1000)
                gaps = [gap for one in served for gap in one.itls_s]
                yield {
                    "part": "injected", "machine": steps.name, "seed": seed, "load": load,
                    "overhead_ms": overhead_ms,
                    "ttft_ms": 1000 * statistics.fmean(one.ttft_s for one in served),
                    "itl_ms": 1000 * statistics.fmean(gaps),
                    "itl_p99_ms": 1000 * percentile(gaps, 0.99),
                    "attained": sum(is_good(steps, one) for one in served) / num,
                }  # fmt: skip


def goodput(rows: Sequence[dict[str, Any]], machine: str, overhead_ms: int, seed: int) -> float:
    """The load at which attainment first falls below the target; 0 when it never reaches it."""
    before_load, before = 0.0, 1.0
    for load in LOADS:
        (share,) = pick(
            rows, "attained", machine=machine, overhead_ms=overhead_ms, seed=seed, load=load
        )
        if share < TARGET:
            return before_load + (load - before_load) * (before - TARGET) / (before - share)
        before_load, before = load, share
    return before_load


def slope_of(rows: Sequence[dict[str, Any]], machine: str, figure: str) -> Estimate:
    """Milliseconds more of a figure for each injected one, at the middle load."""
    slopes = []
    for seed in sorted({row["seed"] for row in rows if "seed" in row}):
        ys = pick(rows, figure, machine=machine, load=LATENCY_LOAD, seed=seed)
        slopes.append(slope([float(ms) for ms in INJECTED_MS], ys))
    return mean_of(slopes)


# -- measured --------------------------------------------------------------------------------------


class Timed:
    """The real scheduler with a batch that decodes and a queue that waits."""

    def __init__(self, batch: int, queue: int) -> None:
        # The first to decode goes on while the prompts of the others are computed.
        num_tokens = CONTEXT + NUM_WARM + NUM_TIMED + batch
        self._max_tokens = num_tokens - CONTEXT + 1  # more than are timed: nobody ends meanwhile
        pool = BlockPool(batch * -(-num_tokens // 32) + 64, 32)
        self._scheduler = DecodeScheduler(
            pool, SchedulerLimits(MAX_MODEL_LEN, max(512, batch), batch), FINGERPRINT
        )
        for number in range(batch + queue):
            self._add(number)
        while self.step()[1] < batch:
            pass  # prompts are computed in chunks first

    def _add(self, number: int) -> None:
        request_id = f"r{number}"
        prompt = (number + 16, *(1,) * (CONTEXT - 1))
        sampling = SamplingParams(max_tokens=self._max_tokens, temperature=0.0)
        self._scheduler.on_event(
            ControlReceived(Reserve(request_id, 1, prompt, sampling)), 0.0
        )  # fmt: skip
        self._scheduler.on_event(ControlReceived(ComputeHere(request_id, 1)), 0.0)

    def step(self) -> tuple[float, int]:
        """Seconds in the scheduler, and how many sequences sampled."""
        scheduler = self._scheduler
        started = time.perf_counter()
        plan = scheduler.schedule(0.0)
        seconds = time.perf_counter() - started
        if plan is None:
            return seconds, 0
        tokens = tuple(SampledToken(*one.key, PLAIN_TOKEN) for one in scheduler.sampled(plan))
        results = [StepResult(plan.step, 0, tokens)]
        started = time.perf_counter()
        scheduler.update(plan, results, 0.0)
        seconds += time.perf_counter() - started
        scheduler.take_commands()
        return seconds, len(tokens)


def measure(batch: int, queue: int, num_steps: int = NUM_TIMED) -> dict[str, Any]:
    """Part 2: one cell."""
    timed = Timed(batch, queue)
    for _ in range(NUM_WARM):
        timed.step()
    gc.collect()
    times = []
    for _ in range(num_steps):
        seconds, num_sampled = timed.step()
        assert num_sampled == batch
        times.append(1e6 * seconds)
    return {
        "part": "measured", "batch": batch, "queue": queue, "steps": num_steps,
        "p50_us": percentile(times, 0.5), "p99_us": percentile(times, 0.99),
    }  # fmt: skip


# -- together --------------------------------------------------------------------------------------


def null_cases(scale: Scale) -> list[NullCase]:
    """Once a request is not once a step; and what is added to a step with one sequence is added."""
    spread, shift, added = 0.0, 0.0, 0.0
    for seed in scale.seeds:
        drawn = traffic(MEASURED, 1.0, seed, scale.count(20, 5))
        arrivals = [replace(one, time_s=100.0 * one.number) for one in drawn]  # never two at once
        plain = serve(MEASURED, arrivals, 0.0)
        late = serve(MEASURED, arrivals, 0.0, partial(LateGate, delay_s=0.02))
        slow = serve(MEASURED, arrivals, 0.02)
        for one, other, third in zip(plain, late, slow, strict=True):
            spread = max(spread, abs(one.tpot_s - other.tpot_s))
            shift = max(shift, abs(other.ttft_s - one.ttft_s - 0.02))
            if one.itls_s:
                added = max(added, abs(third.tpot_s - one.tpot_s - 0.02))
    return [
        NullCase(
            "20 ms once a request instead of once a step, one request at a time, gaps",
            f"differ by {1e6 * spread:.3f} us (and the first token comes 20 ms later, "
            f"{1e6 * shift:.3f} us off)",
            max(spread, shift) < 1e-6,
        ),
        NullCase(
            "20 ms a step, one request at a time, gaps beyond the 20 ms",
            f"{1e6 * added:.3f} us",
            added < 1e-6,
        ),
    ]


def run(scale: Scale) -> Report:
    """All of it."""
    rows = [row for steps in MACHINES for row in inject(steps, scale)]
    if scale.live:
        rows += [measure(batch, queue) for batch in BATCHES for queue in QUEUES]
    tables = [_injected_table(rows, steps) for steps in MACHINES]
    if scale.live:
        tables.append(_measured_table(rows))
    return Report(
        name=NAME,
        question=QUESTION,
        clock=VIRTUAL,
        setting=[
            f"Injected: one decode pool of {NUM_SLOTS} slots, prompts of {PROMPT.mean:g}, answers "
            f"of {OUTPUT.mean:g} tokens; Poisson. Latencies at half load. Goodput: the load at "
            f"which {TARGET:.0%} have their first token within {TTFT_STEPS:g} and the others every "
            f"{TPOT_STEPS:g} steps of a full batch.",
            *(f"`{steps.name}`: {steps.source}." for steps in MACHINES),
        ],
        tables=tables,
        nulls=null_cases(Scale(2, scale.size)),
        reading=_reading(rows),
        rows=rows,
        draw=partial(_draw, rows),
        live_part="The measured part is wall time of `schedule()` and `update()` alone, over "
        f"{NUM_TIMED} steps of sequences that all decode; the queue waits for a slot."
        if scale.live
        else "",
    )


def _goodputs(rows: Sequence[dict[str, Any]], machine: str, overhead_ms: int) -> Estimate:
    seeds = sorted({row["seed"] for row in rows if "seed" in row})
    return mean_of([goodput(rows, machine, overhead_ms, seed) for seed in seeds])


def _injected_table(rows: Sequence[dict[str, Any]], steps: StepTime) -> Table:
    lines = []
    for overhead_ms in INJECTED_MS:
        where = {"machine": steps.name, "overhead_ms": overhead_ms, "load": LATENCY_LOAD}
        cells = [
            str(mean_of(pick(rows, figure, **where)))
            for figure in ("ttft_ms", "itl_ms", "itl_p99_ms")
        ]
        lines.append((f"{overhead_ms}", *cells, str(_goodputs(rows, steps.name, overhead_ms))))
    header = ["ms a step", "TTFT (ms)", "ITL (ms)", "p99 ITL (ms)", "goodput, as a load"]
    title = f"Injected, {steps.name}: a step of a full batch takes {1000 * full_step_s(steps):.1f}"
    return Table(f"{title} ms", header, lines)


def _measured_table(rows: Sequence[dict[str, Any]]) -> Table:
    lines = []
    for row in rows:
        if row["part"] == "measured":
            batch = row["batch"]
            shares = [
                f"{row['p50_us'] / 1e6 / steps.step_s(batch, batch * 512, []):.2%}"
                for steps in MACHINES
            ]
            figures = (short(row["p50_us"]), short(row["p99_us"]), short(row["p50_us"] / batch))
            lines.append((f"{batch}, {row['queue']}", *figures, *shares))
    header = ["batch, queue", "p50 (us)", "p99 (us)", "us a sequence"]
    header += [f"of a step, {steps.name}" for steps in MACHINES]
    return Table("Measured: schedule() and update() of one step", header, lines)


def _reading(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for steps in MACHINES:
        found = [_goodputs(rows, steps.name, ms) for ms in (INJECTED_MS[0], INJECTED_MS[-1])]
        step_ms = 1000 * full_step_s(steps)
        lines.append(
            f"`{steps.name}`, a step of {step_ms:.0f} ms and so {TPOT_STEPS * step_ms:.0f} ms "
            "between tokens at most: each millisecond a step adds "
            f"{slope_of(rows, steps.name, 'itl_ms')} ms to the mean gap and "
            f"{slope_of(rows, steps.name, 'ttft_ms')} ms to the mean time to the first token; "
            f"{INJECTED_MS[-1]} ms take goodput from {found[0]} to {found[1]}."
        )
    lines.append(
        "Where a step costs by the sequence it is more than one for one: longer steps mean more "
        "sequences in each. Whether 20 ms matter depends on the step: they are little beside a "
        "CPU's step and several times an accelerator's."
    )
    measured = [row for row in rows if row["part"] == "measured"]
    if measured:
        by_cell = {(row["batch"], row["queue"]): row for row in measured}
        large = by_cell[BATCHES[-1], QUEUES[-1]]
        queues = large["p50_us"] / by_cell[BATCHES[-1], QUEUES[0]]["p50_us"]
        share = large["p50_us"] / 1e6 / ROOFLINE.step_s(BATCHES[-1], BATCHES[-1] * 512, [])
        lines.append(
            f"The real scheduler takes {short(large['p50_us'])} us for a step of {BATCHES[-1]} "
            f"sequences ({share:.1%} of such a step on the roofline); a queue of "
            f"{QUEUES[-1]} instead of {QUEUES[0]} makes that {queues:.2f} times. Sending the "
            "plan, detokenizing and HTTP are not in it."
        )
    return lines


def _draw(rows: Sequence[dict[str, Any]], figure: Any) -> None:  # noqa: ANN401 - matplotlib's
    for axes, name, label in zip(
        figure.subplots(1, 3),
        ("itl_ms", "ttft_ms", ""),
        ("mean gap (ms)", "mean time to first token (ms)", "goodput, as a load"),
        strict=True,
    ):
        for colour, steps in zip(COLOURS, MACHINES, strict=False):
            found = [
                mean_of(pick(rows, name, machine=steps.name, overhead_ms=ms, load=LATENCY_LOAD))
                if name
                else _goodputs(rows, steps.name, ms)
                for ms in INJECTED_MS
            ]
            errors = [[f.value - f.low for f in found], [f.high - f.value for f in found]]
            axes.errorbar(INJECTED_MS, [f.value for f in found], errors, color=colour, marker="o",
                          capsize=3, label=steps.name)  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.set(xlabel="injected (ms a step)", ylabel=label)
    figure.axes[0].legend(frameon=False)
