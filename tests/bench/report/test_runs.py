"""Folders in, files out; sweeps pooled by rate; runs of the same name told apart."""

import io
import json
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from rich.console import Console

from bench.load.analysis.compare import Comparison, Settings, compare, conclude, parse_gate
from bench.load.analysis.goodput import Point, Verdict
from bench.load.record import write_run
from bench.load.sweep import SWEEP_FILE, SweepRecord
from bench.report.drawing.plot import Line
from bench.report.figures.load import attainment, goodput
from bench.report.figures.load_points import load_points
from bench.report.files import write_report
from bench.report.focus import focus
from bench.report.runs import load_runs, sides_of, write_comparison
from bench.report.terminal import show
from protocol.errors import ConfigError
from tests.bench.example import sample_run, sample_runs


def _sweep(folder: Path, rates: tuple[float, ...] = (2.0, 6.0), num_rounds: int = 2) -> Path:
    for rate in rates:
        for seed in range(num_rounds):
            manifest, records = sample_run(seed, rate, 8.0)
            own = [record for record in records if record.target == "disaggregated"]
            manifest = msgspec.structs.replace(
                manifest,
                targets=[{"name": "disaggregated", "url": "", "model": ""}],
                valid=True,
                invalid_reasons=[],
            )
            write_run(folder / f"rate-{rate:g}-seed-{seed}", manifest, own)
    points = tuple(Point(rate, Verdict(True, True, {}), num_rounds) for rate in rates)
    record = SweepRecord("baton bench sweep", "disaggregated", 4, points)
    (folder / SWEEP_FILE).write_bytes(msgspec.json.encode(record))
    return folder


def test_rounds_of_a_rate_are_one_point(tmp_path: Path) -> None:
    sides = sides_of(load_runs([_sweep(tmp_path)]))
    (points,) = load_points(sides).values()
    assert [point.rate for point in points] == [2.0, 6.0]
    assert [point.rate_per_accelerator for point in points] == [0.5, 1.5]
    assert [len(point.sides) for point in points] == [2, 2]
    share = points[0].share("joint")
    assert share.num == sum(len(side.records) for side in points[0].sides)
    line = next(layer for layer in attainment(sides).layers if isinstance(layer, Line))
    assert [x for x, _ in line.points] == [0.5, 1.5]
    assert goodput(sides).table[1][0] == "disaggregated"


def test_two_folders_with_the_same_name_and_rate_are_two_targets(tmp_path: Path) -> None:
    for name, seed in (("before", 0), ("after", 1)):
        write_run(tmp_path / name, *sample_run(seed, 4.0, 6.0))
    runs = load_runs([tmp_path / "before", tmp_path / "after"])
    names = {side.name for side in sides_of(runs)}
    assert names == {
        *("before: disaggregated", "before: colocated"),
        *("after: disaggregated", "after: colocated"),
    }
    assert len(load_points(sides_of(runs))) == 4


def test_two_folders_with_other_rates_are_one_target(tmp_path: Path) -> None:
    for name, rate in (("slow", 2.0), ("fast", 4.0)):
        write_run(tmp_path / name, *sample_run(0, rate, 6.0))
    runs = load_runs([tmp_path / "fast", tmp_path / "slow"])
    assert [run.rate for run in runs] == [2.0, 4.0]
    assert len(load_points(sides_of(runs))) == 2


def test_colours_belong_to_names() -> None:
    colors: dict[str, set[int]] = {}
    for side in sides_of(sample_runs(0, (2, 4))):
        colors.setdefault(side.name, set()).add(side.color)
    assert colors == {"disaggregated": {0}, "colocated": {1}}


def test_details_are_of_the_fastest_rate_that_was_met() -> None:
    sides = sides_of(sample_runs(0, (2, 5, 14)))
    met = [side.run.rate for side in sides if side.summary.attains]
    assert met
    assert {side.run.rate for side in focus(sides).sides} == {max(met)}
    assert focus([]).sides == ()


@pytest.mark.parametrize("case", ["none", "empty", "damaged", "comparison"])
def test_folders_that_hold_no_run_are_named(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "it"
    if case != "none":
        folder.mkdir()
    if case == "damaged":
        (folder / "manifest.json").write_text("{")
    if case == "comparison":
        write_run(folder, *sample_run(0, 2.0, 2.0))
        (folder / "compare.json").write_text("[]")
    with pytest.raises(ConfigError, match=str(folder)):
        load_runs([folder])


def test_files_and_terminal(tmp_path: Path) -> None:
    manifest, records = sample_run(0, 6.0, 12.0)
    names = ["disaggregated", "colocated"]
    pairs = compare(records, names, [0, 30], settings=Settings(num_draws=100))
    outcome, reasons = conclude(pairs, [parse_gate("ttft_s.p50=0.01")])
    assert outcome == "fail"
    write_run(tmp_path, manifest, records)
    found = Comparison(1, "1", names[0], 2, 0.95, 0.05, 0, tuple(pairs), outcome, reasons)
    write_comparison(tmp_path, found)
    assert json.loads((tmp_path / "compare.json").read_text())["verdict"] == "fail"
    report = write_report(load_runs([tmp_path]), tmp_path, plots=False)
    assert {"ratios-0", "attainment"} <= {plot.key for plot in report.plots}
    assert "colocated against disaggregated" in (tmp_path / "report.html").read_text()
    console = Console(file=io.StringIO(), width=120)
    show(console, report)
    assert isinstance(console.file, io.StringIO)
    told = console.file.getvalue()
    for words in ("INVALID", "an example", "attainment", "TTFT, from the intended time"):
        assert words in told


def test_every_plot_is_a_picture_of_its_own(tmp_path: Path) -> None:
    report = write_report(sample_runs(0, (4,)), tmp_path)
    for plot in report.plots:
        text = (tmp_path / "plots" / f"{plot.key}.svg").read_text()
        assert plot.title in ElementTree.fromstring(text).itertext()
        assert "var(" not in text  # few programs but browsers know variables
        assert "light-dark" not in text
