"""A report's files: ``report.html``, and ``plots/*.png`` where matplotlib is there."""

from collections.abc import Sequence
from pathlib import Path

from bench.report.build import Report, build_report
from bench.report.page import render
from bench.report.png import write_pngs
from bench.report.runs import Run

REPORT_FILE = "report.html"
PLOTS_FOLDER = "plots"


def write_report(runs: Sequence[Run], folder: Path, *, pngs: bool = True) -> Report:
    """Make the report of these runs and write it into ``folder``.

    Raises:
        ConfigError: PNGs are wanted, and matplotlib is not installed.
    """
    report = build_report(runs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT_FILE).write_text(render(report), encoding="utf-8")
    if pngs:
        plots = folder / PLOTS_FOLDER
        plots.mkdir(exist_ok=True)
        write_pngs(report.plots, plots)
    return report
