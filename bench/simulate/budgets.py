"""What a chunk's size costs whom: the decoding neighbours, or the long prompt itself.

Short chats decode on two ranks while long prompts come. Colocated, both ranks do everything and a
step computes at most a budget of tokens; disaggregated, one rank computes the long prompts in
chunks of the same size, and the other decodes. Same traffic, same ranks.
"""

import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from bench.simulate.cluster import Cluster, ClusterSetting, Served
from bench.simulate.estimates import Estimate, mean_of, percentile, pick, ratio, short
from bench.simulate.pools import DecodeSetting, PrefillSetting, seeded
from bench.simulate.report import COLOURS, VIRTUAL, NullCase, Report, Scale, Table
from bench.simulate.step_time import MEASURED, ROOFLINE, StepTime
from bench.simulate.workload import Arrival, Lengths, poisson

NAME = "budgets"
QUESTION = "What does the token budget of a step trade, and what is left of that when split?"
BUDGETS = tuple(128 << power for power in range(7))
LINES = ("colocated", "disaggregated")
CASES = (("measured", 1024), ("measured", 4096), ("roofline", 8192), ("roofline", 32_768))
MACHINES: dict[str, StepTime] = {steps.name: steps for steps in (MEASURED, ROOFLINE)}
CHAT_PROMPT, CHAT_OUTPUT = 32, Lengths(64, 0.5, 512)
LONG_OUTPUT = 8
BATCH = 8  # decoding sequences of a rank by which loads are stated
CHAT_LOAD, LONG_LOAD = 0.3, 0.4  # of one rank
NUM_LONG = 6
NUM_SLOTS = 32


def traffic(steps: StepTime, long_tokens: int, seed: int, num_long: int) -> list[Arrival]:
    """Chats, and long prompts among them; ``num_long`` in the mean."""
    random = seeded(NAME, steps.name, long_tokens, seed)
    long_per_s = LONG_LOAD / steps.step_s(0, 0, [(long_tokens, 0)])
    step_s = steps.step_s(BATCH, BATCH * CHAT_PROMPT * 2, [])
    chat_per_s = CHAT_LOAD * BATCH / (CHAT_OUTPUT.mean * step_s)
    end_s = num_long / long_per_s
    coming = [("chat", moment) for moment in _until(random, chat_per_s, end_s)]
    coming += [("long", moment) for moment in _until(random, long_per_s, end_s)]
    arrivals = []
    for number, (kind, time_s) in enumerate(sorted(coming, key=lambda one: one[1])):
        prompt = CHAT_PROMPT if kind == "chat" else long_tokens
        output = CHAT_OUTPUT.draw(random) if kind == "chat" else LONG_OUTPUT
        arrivals.append(Arrival(number, time_s, prompt, output, kind))
    return arrivals


def _until(random: Any, rate: float, end_s: float) -> Iterator[float]:  # noqa: ANN401
    for moment in poisson(random, rate):
        if moment > end_s:
            return
        yield moment


def serve(steps: StepTime, line: str, budget: int, arrivals: Sequence[Arrival]) -> list[Served]:
    """One run on two ranks."""
    decode = DecodeSetting(budget, NUM_SLOTS, num_blocks=1 << 14)
    if line == "colocated":
        return Cluster(ClusterSetting(steps, (decode, decode))).run(arrivals)
    prefill = PrefillSetting(chunk_tokens=budget, num_blocks=1 << 14)
    return Cluster(ClusterSetting(steps, (decode,), (prefill,))).run(arrivals)


def measure(steps: StepTime, long_tokens: int, scale: Scale) -> Iterator[dict[str, Any]]:
    """Both lines at every budget."""
    for seed in scale.seeds:
        arrivals = traffic(steps, long_tokens, seed, scale.count(NUM_LONG, 2))
        for line in LINES:
            for budget in BUDGETS:
                yield {
                    "machine": steps.name, "long_tokens": long_tokens, "seed": seed,
                    "line": line, "budget": budget,
                    **figures(serve(steps, line, budget, arrivals)),
                }  # fmt: skip


def figures(served: Sequence[Served]) -> dict[str, float]:
    """What the chats felt, and how long the long prompts took.

    The p99 over all gaps between tokens forgets a stall that is rarer than one gap in a hundred,
    however long; so each chat's longest gap counts as well.
    """
    chats = [one for one in served if one.arrival.kind == "chat"]
    longs = [one for one in served if one.arrival.kind == "long"]
    itls = [gap for one in chats for gap in one.itls_s]
    longest = [max(one.itls_s) for one in chats if one.itls_s]
    found = {
        "itl_p50_s": percentile(itls, 0.5),
        "itl_p99_s": percentile(itls, 0.99),
        "longest_mean_s": statistics.fmean(longest),
        "longest_p99_s": percentile(longest, 0.99),
        "chat_ttft_p99_s": percentile([one.ttft_s for one in chats], 0.99),
    }
    if longs:
        found["long_ttft_s"] = statistics.fmean(one.ttft_s for one in longs)
    return found


def null_case(scale: Scale) -> NullCase:
    """Chats alone: no prompt is cut, so a budget has nothing to decide."""
    found = []
    for seed in scale.seeds:
        drawn = traffic(MEASURED, 1024, seed, scale.count(NUM_LONG, 2))
        chats = [arrival for arrival in drawn if arrival.kind == "chat"]
        runs = [figures(serve(MEASURED, "colocated", budget, chats)) for budget in BUDGETS]
        values = [run["longest_p99_s"] for run in runs]
        found.append(max(values) / min(values) - 1)
    return NullCase(
        f"chats without long prompts, longest gaps at budgets {BUDGETS[0]} to {BUDGETS[-1]}",
        f"differs by {max(found):.2%}",
        max(found) < 0.02,
    )


def run(scale: Scale) -> Report:
    """All of it."""
    rows = [
        row for machine, tokens in CASES for row in measure(MACHINES[machine], tokens, scale)
    ]  # fmt: skip
    return Report(
        name=NAME,
        question=QUESTION,
        clock=VIRTUAL,
        setting=[
            f"Two ranks. Chats: prompts of {CHAT_PROMPT} tokens, answers of "
            f"{CHAT_OUTPUT.mean:g}, CV {CHAT_OUTPUT.cv:g}, {CHAT_LOAD:g} of one rank's load; long "
            f"prompts at {LONG_LOAD:g} of one rank's load. Poisson, both.",
            "Colocated: two ranks that do both. Disaggregated: one prefill rank, one decode rank.",
            *(f"`{steps.name}`: {steps.source}." for steps in (MEASURED, ROOFLINE)),
        ],
        tables=[_table(rows, machine, tokens) for machine, tokens in CASES],
        nulls=[null_case(scale)],
        reading=_reading(rows),
        rows=rows,
        draw=partial(_draw, rows),
        size=(11.0, 7.0),
    )


def _table(rows: Sequence[dict[str, Any]], machine: str, long_tokens: int) -> Table:
    shown = (("longest_p99_s", 1000.0), ("itl_p99_s", 1000.0), ("long_ttft_s", 1.0))
    lines = []
    for budget in BUDGETS:
        where = {"machine": machine, "long_tokens": long_tokens, "budget": budget}
        cells = [str(budget)]
        for figure, scale in shown:
            for line in LINES:
                values = pick(rows, figure, line=line, **where)
                cells.append(str(mean_of([scale * value for value in values])))
        lines.append(tuple(cells))
    names = ("longest gap of a chat, p99 (ms)", "p99 of all gaps (ms)", "TTFT of long (s)")
    header = ("budget", *(f"{name}, {line}" for name in names for line in LINES))
    return Table(f"{machine}, long prompts of {long_tokens} tokens", header, tuple(lines))


def _grows(
    rows: Sequence[dict[str, Any]], case: tuple[str, int], line: str, figure: str
) -> Estimate:
    """From the smallest budget to the largest."""
    machine, tokens = case
    where = {"machine": machine, "long_tokens": tokens, "line": line}
    ends = (pick(rows, figure, budget=budget, **where) for budget in (BUDGETS[-1], BUDGETS[0]))
    return ratio(*ends)


def _reading(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for case in CASES:
        machine, tokens = case
        found = {
            (line, figure): _grows(rows, case, line, figure)
            for line in LINES
            for figure in ("longest_p99_s", "long_ttft_s")
        }
        where = {"machine": machine, "long_tokens": tokens}
        ttfts = [pick(rows, "long_ttft_s", line=line, budget=512, **where) for line in LINES]
        gaps = [
            1000 * mean_of(pick(rows, "longest_p99_s", line=line, budget=budget, **where)).value
            for line, budget in (("colocated", BUDGETS[0]), ("disaggregated", 512))
        ]
        lines.append(
            f"`{machine}`, prompts of {tokens}: from a budget of {BUDGETS[0]} to {BUDGETS[-1]} a "
            f"chat's longest gap (p99) becomes {found['colocated', 'longest_p99_s']} times as long "
            f"colocated, {found['disaggregated', 'longest_p99_s']} disaggregated; the long "
            f"prompt's TTFT {found['colocated', 'long_ttft_s']} and "
            f"{found['disaggregated', 'long_ttft_s']} times. The smallest budget leaves "
            f"{short(gaps[0])} ms colocated; split it is {short(gaps[1])} ms. At a budget of 512 "
            f"the long prompt waits {ratio(ttfts[1], ttfts[0])} times as long split as colocated."
        )
    return [
        *lines,
        "The p99 over all gaps must not be used for this: it falls again at large budgets, because "
        "a stall of seconds that hits each chat once is rarer than one gap in a hundred.",
        "What the split costs: the prompts have one rank instead of two, so that a second long "
        "prompt waits for the first, and the prefill rank idles between them.",
    ]


def _draw(rows: Sequence[dict[str, Any]], figure: Any) -> None:  # noqa: ANN401 - matplotlib's
    grid = figure.subplots(2, len(CASES), sharex=True)
    for column, (machine, tokens) in enumerate(CASES):
        for axes, name, scale in zip(
            grid[:, column], ("longest_p99_s", "long_ttft_s"), (1000.0, 1.0), strict=True
        ):
            for colour, line in zip(COLOURS, LINES, strict=False):
                found = [
                    mean_of(pick(rows, name, machine=machine, long_tokens=tokens, line=line,
                                 budget=budget))
                    for budget in BUDGETS
                ]  # fmt: skip
                axes.plot(BUDGETS, [scale * f.value for f in found], marker="o", markersize=4,
                          color=colour, label=line)  # fmt: skip
                low, high = ([scale * max(1e-3, x) for x in xs] for xs in zip(
                    *((f.low, f.high) for f in found), strict=True))  # fmt: skip
                axes.fill_between(BUDGETS, low, high, color=colour, alpha=0.15)
            axes.set_xscale("log", base=2)
            axes.set_xticks(BUDGETS[::2], map(str, BUDGETS[::2]))
        grid[0, column].set_yscale("log")
        grid[1, column].set_ylim(bottom=0)
        grid[0, column].set_title(f"{machine}, {tokens // 1024}K prompts")
        grid[1, column].set_xlabel("budget (tokens)")
    grid[0, 0].set_ylabel("a chat's longest gap, p99 (ms)")
    grid[1, 0].set_ylabel("long prompt: mean TTFT (s)")
    grid[0, 0].legend(frameon=False)
