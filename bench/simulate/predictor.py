"""Shortest first by a predicted length: how good must the prediction be, and who pays?

The production scheduler serves in the order of arrival. Here a gate before it keeps the queue: it
lets in as many as there are slots, in the order of the policy. *SJF* looks when a slot is free;
*SRPT* also sets the one with most left aside for one with less, by the coordinator's own way of
losing an attempt, so that its cached blocks are found again. Predictions are the true lengths times
log-normal noise of a given mean error.
"""

import heapq
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.simulate.cluster import Cluster, ClusterSetting, Gate, Served
from bench.simulate.estimates import Estimate, mean_of, percentile, pick, ratio
from bench.simulate.pools import DecodeSetting, seeded
from bench.simulate.report import COLOURS, VIRTUAL, NullCase, Report, Scale, Table
from bench.simulate.step_time import MEASURED, ROOFLINE, StepTime
from bench.simulate.workload import Arrival, Lengths, Mix, draw

NAME = "predictor"
QUESTION = "What is shortest-first worth by how wrong the predicted lengths are, and who pays?"
NUM_SLOTS = 8
PROMPT, OUTPUT = Lengths(32, 0), Lengths(100, 1.2, 1000)
ERRORS = (0.0, 0.2, 0.4, 0.8, 1.5)  # mean absolute error, as a share of the true length
LOADS = (0.9, 1.2)  # beyond 1 the queue grows as long as the run lasts
NUM_REQUESTS = 250
NULL_LOAD = 0.002
TAIL = 0.1  # the longest tenth
MACHINES: tuple[StepTime, ...] = (MEASURED, ROOFLINE)


@dataclass(frozen=True, slots=True)
class Policy:
    """In which order, and by what knowledge.

    Args:
        error: of the prediction; None is the order of arrival.
        preempts: whether a running request can be set aside.
        buckets: it is only told whether a length is above the median.
    """

    name: str
    error: float | None = None
    preempts: bool = False
    buckets: bool = False


FCFS = Policy("FCFS")
POLICIES = (
    FCFS,
    *(Policy(f"SJF {error:.0%}", error) for error in ERRORS),
    Policy("SJF two buckets", 0.0, buckets=True),
    *(Policy(f"SRPT {error:.0%}", error, preempts=True) for error in ERRORS),
)


def sigma_of(error: float) -> float:
    """Of log-normal noise with median 1 whose mean absolute error is ``error``.

    The error is ``exp(s^2 / 2) erf(s / sqrt(2))``, which rises with s.
    """
    low, high = 0.0, 5.0
    for _ in range(60):
        middle = (low + high) / 2
        if math.exp(middle**2 / 2) * math.erf(middle / math.sqrt(2)) < error:
            low = middle
        else:
            high = middle
    return low


def predictions(policy: Policy, arrivals: Sequence[Arrival], seed: int) -> dict[int, float]:
    """The predicted length of each answer, by the request's number."""
    if policy.error is None:
        return {arrival.number: 0.0 for arrival in arrivals}
    if policy.buckets:
        median = statistics.median(arrival.num_output_tokens for arrival in arrivals)
        return {a.number: float(a.num_output_tokens > median) for a in arrivals}
    # The same noise for all policies, scaled: a larger error is not another draw.
    random, sigma = seeded(NAME, "noise", seed), sigma_of(policy.error)
    return {
        arrival.number: arrival.num_output_tokens * math.exp(sigma * random.gauss(0.0, 1.0))
        for arrival in arrivals
    }


class ShortestFirst:
    """Lets in the request with the least predicted to come, when there is a slot.

    Args:
        cluster: what it stands before.
        num_slots: requests inside at one time.
        predicted: tokens of each answer; among equals the older goes first.
        preempts: set one aside when another has less to come.
    """

    def __init__(
        self, cluster: Cluster, num_slots: int, predicted: dict[int, float], *, preempts: bool
    ) -> None:
        self._cluster = cluster
        self._num_slots = num_slots
        self._predicted = predicted
        self._preempts = preempts
        self._waiting: list[tuple[float, int, Served]] = []
        self._inside: dict[int, Served] = {}

    def arrive(self, served: Served) -> None:
        self._wait(served)
        self._fill()
        if self._preempts and self._waiting:
            self._exchange()

    def leave(self, served: Served) -> None:
        del self._inside[served.arrival.number]
        self._fill()

    def _left(self, served: Served) -> float:
        """A prediction that has proved too short says that it is about to end."""
        return max(1.0, self._predicted[served.arrival.number] - len(served.token_times_s))

    def _wait(self, served: Served) -> None:
        # One that has begun is known better by what is left of it.
        key = self._left(served) if self._preempts else self._predicted[served.arrival.number]
        heapq.heappush(self._waiting, (key, served.arrival.number, served))

    def _fill(self) -> None:
        while self._waiting and len(self._inside) < self._num_slots:
            *_, served = heapq.heappop(self._waiting)
            self._inside[served.arrival.number] = served
            self._cluster.admit(served)

    def _exchange(self) -> None:
        least = self._waiting[0][0]
        longest = max(self._inside.values(), key=self._left)
        if least < self._left(longest):
            del self._inside[longest.arrival.number]
            self._cluster.preempt(longest)
            self._fill()
            self._wait(longest)


def make_gate(policy: Policy, arrivals: Sequence[Arrival], seed: int) -> Callable[[Cluster], Gate]:
    predicted = predictions(policy, arrivals, seed)
    return partial(
        ShortestFirst, num_slots=NUM_SLOTS, predicted=predicted, preempts=policy.preempts
    )  # fmt: skip


def capacity(steps: StepTime) -> float:
    """Requests a second of full slots."""
    step_s = steps.step_s(NUM_SLOTS, NUM_SLOTS * round(PROMPT.mean + OUTPUT.mean), [])
    prompt_s = steps.step_s(0, 0, [(round(PROMPT.mean), 0)])
    return 1 / (prompt_s + OUTPUT.mean * step_s / NUM_SLOTS)


def traffic(
    steps: StepTime, load: float, seed: int, num: int, output: Lengths = OUTPUT
) -> list[Arrival]:
    mix = Mix("chat", 1.0, PROMPT, output)
    return draw(seeded(NAME, steps.name, load, seed), load * capacity(steps), num, [mix])


def serve(steps: StepTime, policy: Policy, arrivals: Sequence[Arrival], seed: int) -> list[Served]:
    # Room for those who are being set aside: the gate, not the scheduler, counts the slots.
    decode = DecodeSetting(512, 4 * NUM_SLOTS)
    gate = make_gate(policy, arrivals, seed)
    return Cluster(ClusterSetting(steps, (decode,)), gate).run(arrivals)


def figures(served: Sequence[Served]) -> dict[str, float]:
    times = [one.e2e_s for one in served]
    by_length = sorted(served, key=lambda one: one.arrival.num_output_tokens)
    longest = by_length[-max(1, round(TAIL * len(served))) :]
    return {
        "e2e_mean_s": statistics.fmean(times),
        "e2e_p50_s": percentile(times, 0.5),
        "e2e_p99_s": percentile(times, 0.99),
        "longest_tenth_s": statistics.fmean(one.e2e_s for one in longest),
        "longest_gap_s": max(max(one.itls_s, default=0.0) for one in served),
        "longest_wait_s": max(one.ttft_s for one in served),
    }


def compare(
    steps: StepTime, load: float, scale: Scale, policies: Sequence[Policy] = POLICIES
) -> Iterator[dict[str, Any]]:
    """All policies on the same traffic."""
    for seed in scale.seeds:
        arrivals = traffic(steps, load, seed, scale.count(NUM_REQUESTS, 30))
        for policy in policies:
            served = serve(steps, policy, arrivals, seed)
            yield {
                "machine": steps.name, "load": load, "seed": seed, "policy": policy.name,
                **figures(served),
            }  # fmt: skip


def over_fcfs(
    rows: Sequence[dict[str, Any]], figure: str, policy: str, **where: object
) -> Estimate:
    found = (pick(rows, figure, policy=name, **where) for name in (policy, FCFS.name))
    return ratio(*found)


def null_cases(scale: Scale) -> list[NullCase]:
    """Nobody waits: order is nothing. All answers are equally long: the shortest is the first."""
    num = scale.count(60, 20)
    idle = traffic(MEASURED, NULL_LOAD, 0, num)
    means = [figures(serve(MEASURED, policy, idle, 0))["e2e_mean_s"] for policy in POLICIES]
    spread = max(means) / min(means) - 1
    equal = traffic(MEASURED, LOADS[-1], 0, num, Lengths(OUTPUT.mean, 0))
    oracles = [FCFS, *(policy for policy in POLICIES if policy.error == 0)]
    runs = [figures(serve(MEASURED, policy, equal, 0)) for policy in oracles]
    # A running one always has less left than one that waits, so nobody is set aside either.
    same = max(abs(run["e2e_p99_s"] / runs[0]["e2e_p99_s"] - 1) for run in runs)
    return [
        NullCase(
            f"a load of {NULL_LOAD:g}, mean time to the last token under all policies",
            f"differs by {spread:.2%}",
            spread < 1e-9,
        ),
        NullCase(
            "answers of one length, perfectly predicted, p99 of the time to the last token",
            f"differs by {same:.2%} from FCFS",
            same < 1e-9,
        ),
    ]


def run(scale: Scale) -> Report:
    """All of it."""
    rows = [
        row for steps in MACHINES for load in LOADS for row in compare(steps, load, scale)
    ]  # fmt: skip
    return Report(
        name=NAME,
        question=QUESTION,
        clock=VIRTUAL,
        setting=[
            f"One decode pool of {NUM_SLOTS} slots; prompts of {PROMPT.mean:g} tokens, answers of "
            f"{OUTPUT.mean:g} on average, CV {OUTPUT.cv:g}. Poisson.",
            "Errors are the mean absolute error as a share of the true length. Two buckets: only "
            "whether a length is above the median is known.",
            "The order is kept by a gate before the production scheduler, which has none but that "
            "of arrival; an oracle of the lengths is not an optimal scheduler.",
            *(f"`{steps.name}`: {steps.source}." for steps in MACHINES),
        ],
        tables=[_table(rows, steps, load) for steps in MACHINES for load in LOADS],
        nulls=null_cases(scale),
        reading=_reading(rows),
        rows=rows,
        draw=partial(_draw, rows),
    )


def _table(rows: Sequence[dict[str, Any]], steps: StepTime, load: float) -> Table:
    where = {"machine": steps.name, "load": load}
    shown = ("e2e_mean_s", "e2e_p99_s", "longest_tenth_s", "longest_wait_s")
    lines = []
    for policy in POLICIES:
        cells = [str(over_fcfs(rows, figure, policy.name, **where)) for figure in shown]
        gap = mean_of(pick(rows, "longest_gap_s", policy=policy.name, **where))
        lines.append((policy.name, *cells, str(gap)))
    header = ["policy", "mean E2E", "p99 E2E", "longest tenth", "longest wait"]
    title = f"{steps.name}, load {load:g}: as multiples of FCFS's"
    return Table(title, [*header, "longest pause (s)"], lines)


def _reading(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for steps in MACHINES:
        for load in LOADS:
            of = partial(over_fcfs, rows, machine=steps.name, load=load)
            lines.append(
                f"`{steps.name}`, load {load:g}: the mean time to the last token is "
                f"{of('e2e_mean_s', 'SJF 0%')} times FCFS's with perfect lengths, "
                f"{of('e2e_mean_s', 'SJF 40%')} with an error of 40 % and "
                f"{of('e2e_mean_s', 'SJF 150%')} with 150 %; the longest tenth pays "
                f"{of('longest_tenth_s', 'SJF 0%')} times, even with perfect lengths."
            )
    where = {"machine": MEASURED.name, "load": LOADS[-1]}
    found = {
        name: over_fcfs(rows, "e2e_mean_s", name, **where)
        for name in ("SJF 0%", "SJF two buckets", "SRPT 0%", "SRPT 150%")
    }
    wait = over_fcfs(rows, "longest_wait_s", "SJF 0%", **where)
    tail = over_fcfs(rows, "e2e_p99_s", "SJF 0%", **where)
    return [
        *lines,
        f"Two buckets have a mean of {found['SJF two buckets']} times FCFS's where perfect lengths "
        f"have {found['SJF 0%']} (`measured`, load {LOADS[-1]:g}).",
        f"Setting running requests aside: {found['SRPT 0%']} times FCFS's mean with perfect "
        f"lengths, {found['SRPT 150%']} with an error of 150 %; answers that have begun pause for "
        "as long as the last column says, which no stream's reader will like.",
        f"Starvation: with perfect lengths the longest wait is {wait} times FCFS's and the p99 "
        f"{tail} times; nothing here ages, so while the load stays above 1 the longest wait on.",
    ]


def _draw(rows: Sequence[dict[str, Any]], figure: Any) -> None:  # noqa: ANN401 - matplotlib's
    left, right = figure.subplots(1, 2)
    xs = [100 * error for error in ERRORS]
    for axes, name, title in (
        (left, "e2e_mean_s", "mean, all"), (right, "longest_tenth_s", "mean, longest tenth")
    ):  # fmt: skip
        colours = iter(COLOURS)
        for index, kind in enumerate(("SJF", "SRPT")):
            for load in LOADS:
                found = [
                    over_fcfs(rows, name, f"{kind} {error:.0%}", machine=MEASURED.name, load=load)
                    for error in ERRORS
                ]
                errors = [[f.value - f.low for f in found], [f.high - f.value for f in found]]
                beside = [x + 3 * index + 1.5 * (load > 1) for x in xs]
                axes.errorbar(beside, [f.value for f in found], errors, marker="o", capsize=3,
                              color=next(colours), label=f"{kind}, load {load:g}")  # fmt: skip
        axes.axhline(1.0, color="#888888", linewidth=0.8)
        axes.set(xlabel="mean error of the predicted length (%)",
                 ylabel="time to the last token, of FCFS's", title=title)  # fmt: skip
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  frameon=False)  # fmt: skip
