"""A report's files: ``report.html``, and each of its plots as ``plots/KEY.svg``."""

from collections.abc import Sequence
from pathlib import Path

from bench.report.build import Report, build_report
from bench.report.drawing.svg import file_of
from bench.report.page import render
from bench.report.runs import Run

REPORT_FILE = "report.html"
PLOTS_FOLDER = "plots"


def write_report(runs: Sequence[Run], folder: Path, *, plots: bool = True) -> Report:
    """Make the report of these runs and write it into ``folder``.

    Args:
        plots: also as files of their own.
    """
    report = build_report(runs)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT_FILE).write_text(render(report), encoding="utf-8")
    if plots:
        (folder / PLOTS_FOLDER).mkdir(exist_ok=True)
        for plot in report.plots:
            path = folder / PLOTS_FOLDER / f"{plot.key}.svg"
            path.write_text(file_of(plot), encoding="utf-8")
    return report
