"""Budgets: nothing to trade without long prompts, much with them, nothing on a pure decode rank."""

from bench.simulate.budgets import BUDGETS, LINES, measure, null_case
from bench.simulate.estimates import pick
from bench.simulate.report import Scale
from bench.simulate.step_time import ROOFLINE

SMALL = Scale(1, 0.35)


def test_without_long_prompts_a_budget_decides_nothing() -> None:
    null = null_case(Scale(1, 0.1))
    assert null.holds, null


def test_a_budget_trades_neighbours_for_the_prompt_only_where_they_meet() -> None:
    rows = list(measure(ROOFLINE, 8192, SMALL))
    grows = {}
    for line in LINES:
        first, *_, last = pick(rows, "longest_p99_s", line=line)
        grows[line] = last / first
    assert grows["colocated"] > 4
    assert grows["disaggregated"] < 1.3
    ttfts = pick(rows, "long_ttft_s", line="colocated")
    assert ttfts[0] > ttfts[-1]
    assert len(ttfts) == len(BUDGETS)
