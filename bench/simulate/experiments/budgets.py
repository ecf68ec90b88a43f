"""What a chunk's size costs whom: the decoding neighbours, or the long prompt itself.

Short chats decode on two ranks while long prompts come. Colocated, both ranks do everything and a
step computes at most a budget of tokens; disaggregated, one rank computes the long prompts in
chunks of the same size, and the other decodes. Same traffic, same ranks.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from bench.load.analysis.metrics import gaps_of, ttft_of
from bench.load.record import RequestRecord
from bench.load.workload.schedule import Schedule
from bench.load.workload.sessions import Lengths
from bench.report.drawing.plot import Axis, Plot
from bench.simulate.driver import ClusterSetting, serve
from bench.simulate.estimates import Estimate, mean_of, pick, ratio, tail
from bench.simulate.pools import DecodeSetting, PrefillSetting
from bench.simulate.report import NullCase, Report, Scale, Table, curves
from bench.simulate.step_time import MEASURED, ROOFLINE, StepTime
from bench.simulate.workload import Blend, lengths, traffic

NAME = "budgets"
BUDGETS = tuple(128 << power for power in range(7))
LINES = ("colocated", "disaggregated")
CASES = (("measured", 1024), ("measured", 4096), ("roofline", 8192), ("roofline", 32_768))
MACHINES: dict[str, StepTime] = {steps.name: steps for steps in (MEASURED, ROOFLINE)}
CHAT_PROMPT, CHAT_OUTPUT, CHAT_CV = 32, 64, 0.5
CHAT = Lengths(str(CHAT_PROMPT), lengths(CHAT_OUTPUT, CHAT_CV), "chat")
LONG_OUTPUT = 8
BATCH = 8  # decoding sequences of a rank by which loads are stated
CHAT_LOAD, LONG_LOAD = 0.3, 0.4  # of one rank
NUM_LONG = 6
FIGURES = {
    "longest_p99_s": "longest gap of a chat, p99 (s)",
    "itl_p99_s": "p99 of all gaps (s)",
    "long_ttft_s": "TTFT of long (s)",
}
PLOTTED = ("longest_p99_s", "long_ttft_s")
Rows = list[dict[str, Any]]


def asked(steps: StepTime, long_tokens: int, seed: int, num_long: int) -> Schedule:
    """Chats, and long prompts among them; ``num_long`` in the mean, none for 0."""
    long_per_s = LONG_LOAD / steps.step_s(0, 0, [(long_tokens, 0)])
    step_s = steps.step_s(BATCH, BATCH * CHAT_PROMPT * 2, [])
    chat_per_s = CHAT_LOAD * BATCH / (CHAT_OUTPUT * step_s)
    long = Lengths(str(long_tokens), str(LONG_OUTPUT), "long")
    num_chats = round((num_long or NUM_LONG) * chat_per_s / long_per_s)
    if not num_long:
        return traffic(CHAT, chat_per_s, seed, num_chats)
    blend = Blend(((chat_per_s, CHAT), (long_per_s, long)))
    return traffic(blend, chat_per_s + long_per_s, seed, num_chats + num_long)


def setting(steps: StepTime, line: str, budget: int) -> ClusterSetting:
    """Two ranks."""
    decode = DecodeSetting(budget, num_blocks=1 << 14)
    if line == "colocated":
        return ClusterSetting(steps, (decode, decode))
    prefill = PrefillSetting(chunk_tokens=budget, num_blocks=1 << 14)
    return ClusterSetting(steps, (decode,), (prefill,))


def measure(steps: StepTime, long_tokens: int, scale: Scale) -> Iterator[dict[str, Any]]:
    """Both lines at every budget."""
    for seed in scale.seeds:
        schedule = asked(steps, long_tokens, seed, scale.count(NUM_LONG, 2))
        for line in LINES:
            for budget in BUDGETS:
                yield {
                    "machine": steps.name,
                    "long_tokens": long_tokens,
                    "seed": seed,
                    "line": line,
                    "budget": budget,
                    **figures(serve(setting(steps, line, budget), schedule)),
                }


def figures(records: Sequence[RequestRecord]) -> dict[str, float]:
    """What the chats felt, and how long the long prompts took.

    The p99 over all gaps between tokens forgets a stall that is rarer than one gap in a hundred,
    however long; so each chat's longest gap counts as well.
    """
    gaps = [gaps_of(record) for record in records if record.kind == "chat"]
    longs = [ttft_of(record) or 0.0 for record in records if record.kind == "long"]
    found = {
        "itl_p99_s": tail([gap for own in gaps for gap in own]),
        "longest_p99_s": tail([max(own) for own in gaps if own]),
    }
    return {**found, "long_ttft_s": statistics.fmean(longs)} if longs else found


def null_case(scale: Scale) -> NullCase:
    """Chats alone: no prompt is cut, so a budget has nothing to decide."""
    found = []
    for seed in scale.seeds:
        schedule = asked(MEASURED, 1024, seed, 0)
        values = [
            figures(serve(setting(MEASURED, "colocated", budget), schedule))["longest_p99_s"]
            for budget in BUDGETS
        ]
        found.append(max(values) / min(values) - 1)
    return NullCase(
        f"chats without long prompts, longest gaps at budgets {BUDGETS[0]} to {BUDGETS[-1]}",
        f"differs by {max(found):.2%}",
        max(found) < 0.02,
    )


def run(scale: Scale) -> Report:
    """All of it."""
    rows = [row for machine, tokens in CASES for row in measure(MACHINES[machine], tokens, scale)]
    return Report(
        name=NAME,
        question="What does the token budget of a step trade, and what is left of that when split?",
        setting=[
            f"Two ranks. Chats: prompts of {CHAT_PROMPT} tokens, answers of {CHAT_OUTPUT}, CV "
            f"{CHAT_CV:g}, {CHAT_LOAD:g} of one rank's load; long prompts at {LONG_LOAD:g} of one "
            "rank's load. Poisson, both.",
            "Colocated: two ranks that do both. Disaggregated: one prefill rank, one decode rank.",
            *(f"`{steps.name}`: {steps.source}." for steps in (MEASURED, ROOFLINE)),
        ],
        tables=[_table(rows, machine, tokens) for machine, tokens in CASES],
        nulls=[null_case(scale)],
        reading=_reading(rows),
        rows=rows,
        plots=[
            _plot(rows, case, figure)
            for case in CASES
            for figure in ("longest_p99_s", "long_ttft_s")
        ],
    )


def _table(rows: Rows, machine: str, long_tokens: int) -> Table:
    where = {"machine": machine, "long_tokens": long_tokens}
    lines = []
    for budget in BUDGETS:
        cells = [
            str(mean_of(pick(rows, figure, line=line, budget=budget, **where)))
            for figure in FIGURES
            for line in LINES
        ]
        lines.append((str(budget), *cells))
    header = ("budget", *(f"{name}, {line}" for name in FIGURES.values() for line in LINES))
    return Table(f"{machine}, long prompts of {long_tokens} tokens", header, lines)


def _grows(rows: Rows, case: tuple[str, int], line: str, figure: str) -> Estimate:
    """From the smallest budget to the largest."""
    where = {"machine": case[0], "long_tokens": case[1], "line": line}
    return ratio(
        *(pick(rows, figure, budget=budget, **where) for budget in BUDGETS[:: 1 - len(BUDGETS)])
    )


def _reading(rows: Rows) -> list[str]:
    lines = []
    for case in CASES:
        gaps = [_grows(rows, case, line, "longest_p99_s") for line in LINES]
        longs = [_grows(rows, case, line, "long_ttft_s") for line in LINES]
        where = {"machine": case[0], "long_tokens": case[1], "budget": 512}
        ttfts = [pick(rows, "long_ttft_s", line=line, **where) for line in LINES]
        lines.append(
            f"`{case[0]}`, prompts of {case[1]}: from a budget of {BUDGETS[0]} to {BUDGETS[-1]} a "
            f"chat's longest gap (p99) becomes {gaps[0]} times as long colocated, {gaps[1]} "
            f"disaggregated; the long prompt's TTFT {longs[0]} and {longs[1]} times. At a budget "
            f"of 512 the long prompt waits {ratio(ttfts[1], ttfts[0])} times as long split as "
            "colocated."
        )
    return [
        *lines,
        "The p99 over all gaps must not be used for this: it falls again at large budgets, because "
        "a stall of seconds that hits each chat once is rarer than one gap in a hundred.",
        "What the split costs: the prompts have one rank instead of two, so that a second long "
        "prompt waits for the first, and the prefill rank idles between them.",
    ]


def _plot(rows: Rows, case: tuple[str, int], figure: str) -> Plot:
    machine, tokens = case
    where = {"machine": machine, "long_tokens": tokens}
    found = {
        line: [
            (float(budget), mean_of(pick(rows, figure, line=line, budget=budget, **where)))
            for budget in BUDGETS
        ]
        for line in LINES
    }
    return curves(
        f"budgets-{machine}-{tokens}-{figure.removesuffix('_s').replace('_', '-')}",
        f"{FIGURES[figure]}: {machine}, prompts of {tokens} tokens",
        (Axis("budget of a step", "tokens", log=True), Axis("seconds", "s", low=0.0)),
        found,
    )
