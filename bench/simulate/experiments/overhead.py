"""What a scheduler's own time costs: injected on virtual time, and measured.

1. So many milliseconds are added to every step of the virtual pool, under the same traffic, and
   what becomes of first tokens, gaps and goodput is fitted with a line.
2. The real ``schedule()`` and ``update()`` are timed at several batches and queues, here.
"""

import gc
import statistics
import time
from collections.abc import Iterator
from typing import Any

from bench.load.analysis.metrics import gaps_of, ttft_of
from bench.load.analysis.slo import tpot_of
from bench.load.record import RequestRecord
from bench.load.workload.schedule import Schedule
from bench.load.workload.sessions import Lengths
from bench.report.drawing.plot import Axis, Plot
from bench.simulate.driver import ClusterSetting, serve
from bench.simulate.estimates import Estimate, mean_of, pick, short, slope, tail
from bench.simulate.experiments.disaggregation import goodput
from bench.simulate.pools import FINGERPRINT, MAX_MODEL_LEN, PLAIN_TOKEN, DecodeSetting
from bench.simulate.report import NullCase, Report, Scale, Table, curves
from bench.simulate.step_time import MEASURED, ROOFLINE, StepTime
from bench.simulate.workload import lengths, traffic
from decode.facts import DecodeFacts
from decode.scheduler import DecodeScheduler
from kvcache.blocks import BlockPool
from kvtransfer.events import ControlReceived
from protocol.messages import ComputeHere, Reserve
from protocol.plans import SampledToken, StepResult
from protocol.request import SamplingParams

NAME = "overhead"
INJECTED_MS = (0, 1, 5, 10, 20)
NUM_SLOTS = 32
PROMPT_MEAN, OUTPUT_MEAN = 128, 64
CHAT = Lengths(lengths(PROMPT_MEAN, 0.5), lengths(OUTPUT_MEAN, 0.7), "chat")
LOADS = (0.25, 0.5, 0.75, 1.0)
LATENCY_LOAD = 0.5
NUM_REQUESTS = 120
TTFT_STEPS, TPOT_STEPS, TARGET = 20.0, 2.0, 0.9  # the deadlines, in steps of a full batch
BATCHES, QUEUES = (1, 32, 256), (10, 1000)
NUM_TIMED, NUM_WARM = 300, 40
CONTEXT = 128  # tokens of each sequence when timing starts
MACHINES: tuple[StepTime, ...] = (MEASURED, ROOFLINE)
FIGURES = {"ttft_ms": "TTFT (ms)", "itl_ms": "ITL (ms)", "itl_p99_ms": "p99 ITL (ms)"}
Rows = list[dict[str, Any]]


# -- injected --------------------------------------------------------------------------------------


def full_step_s(steps: StepTime) -> float:
    return steps.step_s(NUM_SLOTS, NUM_SLOTS * (PROMPT_MEAN + OUTPUT_MEAN // 2), [])


def capacity(steps: StepTime) -> float:
    """Requests a second of full slots without overhead."""
    prompt_s = steps.step_s(0, 0, [(PROMPT_MEAN, 0)])
    return 1 / (prompt_s + OUTPUT_MEAN * full_step_s(steps) / NUM_SLOTS)


def run_with(steps: StepTime, schedule: Schedule, overhead_ms: float) -> list[RequestRecord]:
    decode = DecodeSetting(512, NUM_SLOTS, overhead_s=overhead_ms / 1000)
    return serve(ClusterSetting(steps, (decode,)), schedule)


def is_good(steps: StepTime, record: RequestRecord) -> bool:
    step_s, ttft_s, tpot_s = full_step_s(steps), ttft_of(record) or 0.0, tpot_of(record) or 0.0
    return ttft_s <= TTFT_STEPS * step_s and tpot_s <= TPOT_STEPS * step_s


def inject(steps: StepTime, scale: Scale) -> Iterator[dict[str, Any]]:
    """Part 1."""
    num = scale.count(NUM_REQUESTS, 30)
    for seed in scale.seeds:
        for load in LOADS:
            schedule = traffic(CHAT, load * capacity(steps), seed, num)
            for overhead_ms in INJECTED_MS:
                records = run_with(steps, schedule, overhead_ms)
                gaps = [gap for record in records for gap in gaps_of(record)]
                yield {
                    "part": "injected",
                    "machine": steps.name,
                    "seed": seed,
                    "load": load,
                    "overhead_ms": overhead_ms,
                    "ttft_ms": 1000 * statistics.fmean(ttft_of(one) or 0.0 for one in records),
                    "itl_ms": 1000 * statistics.fmean(gaps),
                    "itl_p99_ms": 1000 * tail(gaps),
                    "attained": sum(is_good(steps, one) for one in records) / num,
                }


def _seeds(rows: Rows) -> list[int]:
    return sorted({row["seed"] for row in rows if "seed" in row})


def slope_of(rows: Rows, machine: str, figure: str) -> Estimate:
    """Milliseconds more of a figure for each injected one, at the middle load."""
    found = [
        pick(rows, figure, machine=machine, load=LATENCY_LOAD, seed=seed) for seed in _seeds(rows)
    ]
    return mean_of([slope([float(ms) for ms in INJECTED_MS], ys) for ys in found])


def goodputs(rows: Rows, machine: str, overhead_ms: int) -> Estimate:
    """The load at which attainment first falls below the target."""
    where = {"machine": machine, "overhead_ms": overhead_ms}
    found = [pick(rows, "attained", seed=seed, **where) for seed in _seeds(rows)]
    return mean_of([goodput(LOADS, shares, TARGET) for shares in found])


def null_case(scale: Scale) -> NullCase:
    """What is added to a step with one sequence is added, and no more."""
    added = 0.0
    for seed in scale.seeds:
        schedule = traffic(CHAT, 0.001, seed, scale.count(20, 5))  # never two at once
        plain, slow = (run_with(MEASURED, schedule, ms) for ms in (0, 20))
        for one, other in zip(plain, slow, strict=True):
            if gaps_of(one):
                added = max(added, abs((tpot_of(other) or 0.0) - (tpot_of(one) or 0.0) - 0.02))
    return NullCase(
        "20 ms a step, one request at a time, gaps beyond the 20 ms",
        f"{1e6 * added:.3f} us",
        added < 1e-6,
    )


# -- measured --------------------------------------------------------------------------------------


class Timed:
    """The real scheduler with a batch that decodes and a queue that waits."""

    def __init__(self, batch: int, queue: int) -> None:
        # The first to decode goes on while the prompts of the others are computed.
        num_tokens = CONTEXT + NUM_WARM + NUM_TIMED + batch
        self._max_tokens = num_tokens - CONTEXT + 1  # more than are timed: nobody ends meanwhile
        pool = BlockPool(batch * -(-num_tokens // 32) + 64, 32)
        facts = DecodeFacts(
            model_fingerprint=FINGERPRINT,
            max_model_len=MAX_MODEL_LEN,
            token_budget=max(512, batch),
            max_num_sequences=batch,
        )
        self._scheduler = DecodeScheduler(facts, pool)
        for number in range(batch + queue):
            self._add(number)
        while self.step()[1] < batch:
            pass  # prompts are computed in chunks first

    def _add(self, number: int) -> None:
        request_id = f"r{number}"
        prompt = (number + 16, *(1,) * (CONTEXT - 1))
        sampling = SamplingParams(max_tokens=self._max_tokens, temperature=0.0)
        for message in (Reserve(request_id, 1, prompt, sampling), ComputeHere(request_id, 1)):
            self._scheduler.on_event(ControlReceived(message), 0.0)

    def step(self) -> tuple[float, int]:
        """Seconds in the scheduler, and how many sequences sampled."""
        scheduler = self._scheduler
        started = time.perf_counter()
        plan = scheduler.schedule(0.0)
        seconds = time.perf_counter() - started
        if plan is None:
            return seconds, 0
        tokens = tuple(_token(*one.key) for one in scheduler.sampled(plan))
        results = [StepResult(plan.step, 0, tokens)]
        started = time.perf_counter()
        scheduler.update(plan, results, 0.0)
        seconds += time.perf_counter() - started
        scheduler.take_commands()
        return seconds, len(tokens)


def _token(request_id: str, attempt: int) -> SampledToken:
    return SampledToken(request_id=request_id, attempt=attempt, token_id=PLAIN_TOKEN)


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
        "part": "measured",
        "batch": batch,
        "queue": queue,
        "steps": num_steps,
        "p50_us": tail(times, 0.5),
        "p99_us": tail(times),
    }


# -- together --------------------------------------------------------------------------------------


def run(scale: Scale) -> Report:
    """All of it."""
    rows = [row for steps in MACHINES for row in inject(steps, scale)]
    if scale.live:
        rows += [measure(batch, queue) for batch in BATCHES for queue in QUEUES]
    tables = [_injected_table(rows, steps) for steps in MACHINES]
    return Report(
        name=NAME,
        question="What does a millisecond of scheduling per step cost, and how many are there?",
        setting=[
            f"Injected: one decode pool of {NUM_SLOTS} slots, prompts of {PROMPT_MEAN}, answers of "
            f"{OUTPUT_MEAN} tokens; Poisson. Latencies at half load. Goodput: the load at which "
            f"{TARGET:.0%} have their first token within {TTFT_STEPS:g} and the others every "
            f"{TPOT_STEPS:g} steps of a full batch.",
            *(f"`{steps.name}`: {steps.source}." for steps in MACHINES),
        ],
        tables=[*tables, _measured_table(rows)] if scale.live else tables,
        nulls=[null_case(Scale(2, scale.size))],
        reading=_reading(rows),
        rows=rows,
        plots=[_plot(rows, figure) for figure in ("itl_ms", "ttft_ms")],
        live_part="The measured part is wall time of `schedule()` and `update()` alone, over "
        f"{NUM_TIMED} steps of sequences that all decode; the queue waits for a slot."
        if scale.live
        else "",
    )


def _at(rows: Rows, figure: str, machine: str, overhead_ms: int) -> Estimate:
    where = {"machine": machine, "overhead_ms": overhead_ms, "load": LATENCY_LOAD}
    return mean_of(pick(rows, figure, **where))


def _injected_table(rows: Rows, steps: StepTime) -> Table:
    lines = []
    for ms in INJECTED_MS:
        cells = [str(_at(rows, figure, steps.name, ms)) for figure in FIGURES]
        lines.append((f"{ms}", *cells, str(goodputs(rows, steps.name, ms))))
    header = ("ms a step", *FIGURES.values(), "goodput, as a load")
    title = f"Injected, {steps.name}: a step of a full batch takes {1000 * full_step_s(steps):.1f}"
    return Table(f"{title} ms", header, lines)


def _measured_table(rows: Rows) -> Table:
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
    of_step = [f"of a step, {steps.name}" for steps in MACHINES]
    header = ("batch, queue", "p50 (us)", "p99 (us)", "us a sequence", *of_step)
    return Table("Measured: schedule() and update() of one step", header, lines)


def _reading(rows: Rows) -> list[str]:
    lines = []
    for steps in MACHINES:
        before, after = (goodputs(rows, steps.name, INJECTED_MS[end]) for end in (0, -1))
        lines.append(
            f"`{steps.name}`, a step of {1000 * full_step_s(steps):.0f} ms: each millisecond a "
            f"step adds {slope_of(rows, steps.name, 'itl_ms')} ms to the mean gap and "
            f"{slope_of(rows, steps.name, 'ttft_ms')} ms to the mean time to the first token; "
            f"{INJECTED_MS[-1]} ms take goodput from {before} to {after}."
        )
    return [
        *lines,
        "Where a step costs by the sequence it is more than one for one: longer steps mean more "
        "sequences in each. Whether 20 ms matter depends on the step: they are little beside a "
        "CPU's step and several times an accelerator's.",
        "Sending the plan, detokenizing and HTTP are in none of it.",
    ]


def _plot(rows: Rows, figure: str) -> Plot:
    found = {
        steps.name: [(float(ms), _at(rows, figure, steps.name, ms)) for ms in INJECTED_MS]
        for steps in MACHINES
    }
    return curves(
        f"overhead-{figure.removesuffix('_ms')}",
        f"Mean {FIGURES[figure]} against injected time",
        (Axis("injected, ms a step", low=0.0), Axis("ms", low=0.0)),
        found,
    )
