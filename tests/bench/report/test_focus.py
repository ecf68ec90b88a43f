"""Which runs are shown in detail: one that holds all targets, or else one of each."""

from pathlib import Path
from typing import Any

import msgspec

from bench.load.record import Manifest, write_run
from bench.report.build import build_report
from bench.report.drawing.plot import Line, Plot
from bench.report.focus import focus
from bench.report.runs import Run, load_runs, sides_of
from tests.bench.example import sample_run, sample_runs
from tests.bench.records import record

SLO = {"default": {"ttft_ms": 100, "tpot_ms": 50, "target": 0.9}}
NUM = 40


def _run(target: str, rate: float, *, met: bool, name: str = "", **changes: Any) -> Run:
    manifest: Manifest = msgspec.structs.replace(
        sample_run(0, rate, 1.0)[0],
        **{
            "targets": [{"name": target, "url": "", "model": ""}],
            "arrival": {"rate": rate},
            "slo": SLO,
            "valid": True,
            "invalid_reasons": [],
            **changes,
        },
    )
    ttft_s = 0.02 if met else 0.5
    records = [
        record(index, ttft_s, gaps_s=(0.01,), at_s=index / rate, target=target)
        for index in range(NUM)
    ]
    return Run(Path(target) / (name or f"rate-{rate:g}"), manifest, records)


def _chosen(*runs: Run) -> tuple[list[tuple[str, float]], str]:
    shown = focus(sides_of(sorted(runs, key=lambda run: run.rate)))
    assert [point.name for point in shown.points] == [side.name for side in shown.sides]
    return sorted((side.name, side.run.rate) for side in shown.sides), shown.words


def test_two_sweeps_show_the_highest_rate_that_both_met() -> None:
    runs = [_run("a", rate, met=rate <= 4) for rate in (1, 2, 4)]
    runs += [_run("b", rate, met=rate <= 2) for rate in (1, 2, 4)]
    chosen, words = _chosen(*runs)
    assert chosen == [("a", 2.0), ("b", 2.0)]
    assert "2 requests/s, the highest rate that all of them met" in words
    assert "a/rate-2" in words
    assert "b/rate-2" in words


def test_sweeps_without_a_rate_in_common_show_their_own() -> None:
    runs = [_run("a", 1, met=True), _run("a", 3, met=True), _run("a", 9, met=False)]
    runs += [_run("b", 2, met=True), _run("b", 4, met=False)]
    runs += [_run("c", 1.5, met=False), _run("c", 5, met=False)]
    chosen, words = _chosen(*runs)
    assert chosen == [("a", 3.0), ("b", 2.0), ("c", 1.5)]
    assert "met none in common" in words
    assert "c at 1.5/s (c/rate-1.5, not met)" in words


def test_without_objectives_it_is_the_fastest_that_all_have() -> None:
    runs = [_run("a", rate, met=True, slo=None) for rate in (1, 2, 4)]
    runs += [_run("b", rate, met=True, slo=None) for rate in (1, 2)]
    chosen, words = _chosen(*runs)
    assert chosen == [("a", 2.0), ("b", 2.0)]
    assert "all of them have" in words
    chosen, words = _chosen(*runs[:3], _run("b", 9, met=True, slo=None))
    assert chosen == [("a", 4.0), ("b", 9.0)]
    assert "share none" in words


def test_an_invalid_run_is_shown_only_where_there_is_no_other() -> None:
    bad = {"valid": False, "invalid_reasons": ["late"]}
    runs = [_run("a", 1, met=True), _run("a", 2, met=True, **bad)]
    runs += [_run("b", 1, met=True), _run("b", 2, met=True)]
    assert _chosen(*runs)[0] == [("a", 1.0), ("b", 1.0)]
    assert _chosen(runs[1], *runs[2:])[0] == [("a", 2.0), ("b", 2.0)]


def test_a_run_that_holds_all_targets_is_shown_alone() -> None:
    shown = focus(sides_of(sample_runs(0, (2, 5))))
    assert [side.name for side in shown.sides] == ["disaggregated", "colocated"]
    assert len({side.run.folder for side in shown.sides}) == 1
    assert shown.words.startswith("Of the run rate-")
    assert focus(sides_of(sample_runs(0, (2,)))).words == ""


def test_a_report_of_two_sweeps_lays_their_curves_over_each_other(tmp_path: Path) -> None:
    for name, ttft in (("before", True), ("after", False)):
        for rate in (1.0, 2.0):
            run = _run("same", rate, met=ttft)
            write_run(tmp_path / name / f"rate-{rate:g}-seed-0", run.manifest, run.records)
    runs = load_runs([tmp_path / "before", tmp_path / "after"])
    report = build_report(runs)
    names = {"before: same", "after: same"}
    for key in ("ttft-cdf", "ttft-tail", "e2e-cdf", "send-lag"):
        assert {name for name in _lines(report.plots, key) if name} == names, key
    assert {p.tab for p in report.plots if p.key.startswith("gantt")} == names
    assert {p.tab for p in report.plots if p.key.startswith("ttft-length")} == names
    (latency,) = [section for section in report.sections if section.key == "latency"]
    assert "before: same at 2/s (before/rate-2-seed-0)" in latency.lead
    assert "after: same at 1/s (after/rate-1-seed-0, not met)" in latency.lead


def _lines(plots: list[Plot], key: str) -> list[str]:
    (plot,) = [plot for plot in plots if plot.key == key]
    return [layer.name for layer in plot.layers if isinstance(layer, Line) and layer.points]
