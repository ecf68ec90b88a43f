"""Experiments: no effect where there can be none, the known one where there is; and the command."""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import scipy.stats

from bench.load.analysis.metrics import ttft_of
from bench.simulate.command import NAMES, add_arguments, run_experiments
from bench.simulate.estimates import T_975, difference, mean_of, pick, ratio, short
from bench.simulate.experiments import budgets, disaggregation, overhead, ring, routing
from bench.simulate.report import Scale
from bench.simulate.step_time import MEASURED, ROOFLINE
from protocol.errors import ConfigError

# -- estimates -------------------------------------------------------------------------------------


def test_intervals_are_students_and_cover_the_truth() -> None:
    quantiles = [float(scipy.stats.t.ppf(0.975, df)) for df in range(1, len(T_975) + 1)]
    assert quantiles == pytest.approx(T_975, abs=1e-4)
    found = mean_of([1.0, 2.0, 4.0])
    expected = scipy.stats.t.interval(
        0.95, 2, statistics.fmean([1, 2, 4]), scipy.stats.sem([1, 2, 4])
    )
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-4)
    random = Random("coverage")
    hits = sum(
        not mean_of([random.gauss(3.0, 1.0) for _ in range(5)]).excludes(3.0) for _ in range(1000)
    )
    assert 930 <= hits <= 970


def test_a_paired_effect_does_not_see_what_both_share() -> None:
    shared = [1.0, 10.0, 100.0]
    found = ratio([2 * value for value in shared], shared)
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
    assert difference([value + 1 for value in shared], shared).value == pytest.approx(1.0)
    assert [short(value) for value in (0.0, 1234.5, 12.34, 0.012345)] == [
        *("0", "1234", "12.3", "0.0123")
    ]


# -- what each shows -------------------------------------------------------------------------------


def test_rings_have_no_effect_where_none_can_help_and_are_exact_where_links_are_free() -> None:
    for null in ring.null_cases():
        assert null.holds, null


def test_a_long_prompt_rings_and_gains() -> None:
    single = ring.alone(MEASURED, 4, ring.NEVER, 16_384)
    ringed = ring.alone(MEASURED, 4, None, 16_384)
    assert (ring.ring_size(single), ring.ring_size(ringed)) == (1, 4)
    assert 2 < (ttft_of(single) or 0.0) / (ttft_of(ringed) or 1.0) < 4


@pytest.mark.parametrize("slower", [1, 1000])
def test_slow_links_make_a_forced_ring_lose(slower: int) -> None:
    steps = ring.with_link(ROOFLINE, slower)
    never, always = (
        ttft_of(ring.alone(steps, 2, threshold, 4096)) or 0.0
        for threshold in (ring.NEVER, ring.ALWAYS)
    )
    assert (always < never) is (slower == 1)
    assert ring.ring_size(ring.alone(steps, 2, None, 4096)) == (2 if slower == 1 else 1)


def test_without_long_prompts_a_budget_decides_nothing() -> None:
    null = budgets.null_case(Scale(1, 0.1))
    assert null.holds, null


def test_a_budget_trades_neighbours_for_the_prompt_only_where_they_meet() -> None:
    rows = list(budgets.measure(ROOFLINE, 8192, Scale(1, 0.5)))
    grows = {}
    for line in budgets.LINES:
        first, *_, last = pick(rows, "longest_p99_s", line=line)
        grows[line] = last / first
    assert grows["colocated"] > 4
    assert grows["disaggregated"] < 1.3
    ttfts = pick(rows, "long_ttft_s", line="colocated")
    assert ttfts[0] > ttfts[-1]


def test_chats_one_at_a_time_have_nothing_to_separate() -> None:
    null = disaggregation.null_case(Scale(2, 0.3))
    assert null.holds, null


def test_documents_stall_chats_only_where_they_share_ranks() -> None:
    rows = list(disaggregation.attainments(MEASURED, "mixed", Scale(2, 0.3), loads=(0.5,)))
    slo = disaggregation.SLOS[-1].name
    colocated, split = (
        min(pick(rows, slo, configuration=name)) for name in ("4 colocated", "ring of 2 + 2 decode")
    )
    assert split > colocated + 0.2


@pytest.mark.parametrize(
    ("shares", "expected"),
    [((1.0, 1.0), 0.4), ((1.0, 0.8), 0.3), ((0.5, 0.5), 0.04), ((0.8, 1.0), 0.1)],
)
def test_goodput_is_where_attainment_first_falls_below_its_target(
    shares: tuple[float, ...], expected: float
) -> None:
    assert disaggregation.goodput((0.2, 0.4), shares) == pytest.approx(expected)


def test_one_worker_or_equal_workers_leave_nothing_to_choose() -> None:
    for null in routing.null_cases(Scale(2, 0.2)):
        assert null.holds, null


def test_who_looks_at_prefixes_hits_them() -> None:
    rows = list(routing.compare(ROOFLINE, routing.EQUAL, routing.CASES[0], Scale(1, 0.5)))
    hits = {name: min(pick(rows, "hit_rate", policy=name)) for name in routing.POLICIES}
    for seeing in (routing.PRODUCTION, "prefix only"):
        assert hits[seeing] > hits["least tokens"] + 0.02
    skews = {name: max(pick(rows, "imbalance", policy=name)) for name in routing.POLICIES}
    assert skews["least tokens"] < skews["prefix only"]


def test_a_millisecond_a_step_is_at_least_one_in_every_gap() -> None:
    null = overhead.null_case(Scale(1, 0.25))
    assert null.holds, null
    rows = list(overhead.inject(ROOFLINE, Scale(2, 0.25)))
    assert overhead.slope_of(rows, ROOFLINE.name, "itl_ms").value >= 0.99
    for load in overhead.LOADS:
        gaps = pick(rows, "itl_ms", load=load, seed=0)
        assert gaps == sorted(gaps)


def test_the_real_scheduler_is_timed_at_the_batch_that_was_asked_for() -> None:
    found = overhead.measure(4, 10, num_steps=20)
    assert 0 < found["p50_us"] <= found["p99_us"]


# -- the command -----------------------------------------------------------------------------------


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing",), "no such experiment: nothing; there are ring"),
        (("ring", "--seeds", "1"), "one seed has no interval"),
        (("ring", "--size", "0"), "--size must be above 0"),
    ],
)
def test_mistakes_are_told(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_experiments(parse(*words))


def test_an_experiment_runs_and_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--seeds", "2", "--size", "0.05", "--no-live", "--save", str(tmp_path))
    assert run_experiments(parse("overhead", *small)) == 0
    assert "Null case" in capsys.readouterr().out
    kept = tmp_path / "experiments"
    assert sorted(path.name for path in kept.iterdir()) == [
        *("overhead-itl.svg", "overhead-ttft.svg", "overhead.jsonl", "overhead.md")
    ]
    page = (kept / "overhead.md").read_text()
    for words in ("python -m bench.simulate overhead", "2 seeds", "Virtual time", "none was seen"):
        assert words in page
    head, *rows = map(json.loads, (kept / "overhead.jsonl").read_text().splitlines())
    assert head["environment"]["python"]
    assert rows[0]["part"] == "injected"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_runs_small_and_its_null_case_holds(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "bench.simulate", name, "--seeds", "2"]
    command += ["--size", "0.3", "--no-live", "--save", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "experiments" / f"{name}.md").exists()
