"""Runs, sweeps and reports in a terminal: the tables of the page, and a bar while a run goes on."""

import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as Grid
from rich.text import Text

from bench.load.analysis.goodput import Goodput, Point
from bench.load.analysis.intervals import percentile
from bench.load.driving.driver import Progress as RunProgress
from bench.load.driving.process import OnProgress
from bench.load.record import Manifest, RequestRecord
from bench.report.build import Report
from bench.report.drawing.scale import between, seconds
from bench.report.drawing.table import Cell, Table
from bench.report.runs import Run, sides_of
from bench.report.tables import kinds_table, load_table, metrics_table
from bench.report.verdict import judge

TONES = {"good": "green", "bad": "red", "dim": "dim", "": ""}
SECTIONS = ("summary", "comparison")
NUM_RECENT = 200  # first tokens that the bar's percentiles are of


def show(console: Console, report: Report) -> None:
    """The verdict and the tables; plots are for the page."""
    _show_verdict(console, report.runs)
    for section in report.sections:
        if section.key in SECTIONS:
            _show_tables(console, [item for group in section.groups for item in group])


def show_run(console: Console, manifest: Manifest, records: Sequence[RequestRecord]) -> None:
    """One run: whether to believe it, how it was driven, and its figures."""
    run = Run(Path("run"), manifest, records)
    _show_verdict(console, [run])
    is_closed = manifest.driver.get("loop") == "closed"
    users = f"CLOSED loop of {manifest.driver.get('num_users')} users"
    target = manifest.targets[0]
    console.print(
        f"{target['name']} at {target['url']}, {users if is_closed else 'open loop'}, seed "
        f"{manifest.seed}, {manifest.duration_s:.1f} s; send lag p99 "
        f"{seconds(manifest.send_lag['p99'])}",
        highlight=False,
        markup=False,
    )
    sides = sides_of([run])
    tables = [load_table(sides), *map(metrics_table, sides)]
    tables += [kinds_table(side) for side in sides if len(side.summary.by_kind) > 1]
    _show_tables(console, tables)


def _show_verdict(console: Console, runs: Sequence[Run]) -> None:
    verdict = judge(runs)
    color = {"VALID": "green", "INVALID": "red"}.get(verdict.word, "yellow")
    console.print(f"[bold {color}]{verdict.word}[/]", highlight=False)
    for line in (*verdict.reasons, *verdict.notes):
        console.print(f"  {escape(line)}", highlight=False)


def _show_tables(console: Console, items: Sequence[object]) -> None:
    for item in items:
        if isinstance(item, Table) and not item.is_empty:
            console.print()
            console.print(_grid(item))


def _grid(table: Table) -> Grid:
    grid = Grid(title=escape(table.title), title_justify="left", box=None, pad_edge=False)
    grid.title_style = "bold"
    for index, name in enumerate(table.head):
        grid.add_column(escape(name), justify="right" if index else "left", header_style="dim")
    for row in table.rows:
        grid.add_row(*(_text(cell) for cell in row))
    return grid


def _text(cell: Cell) -> Text:
    text = Text(cell.text, style=TONES[cell.tone])
    if cell.below:
        text.append(f"\n{cell.below}", style="dim")
    return text


# ---- sweeps ------------------------------------------------------------------------------------


def show_points(console: Console, points: Sequence[Point], num_accelerators: int) -> None:
    """A sweep's rates in order."""
    rows = []
    for point in sorted(points, key=lambda point: point.rate):
        verdict = Cell("pass", tone="good") if point.verdict.passed else Cell("fail", tone="bad")
        for kind, share in point.verdict.shares.items():
            rows.append(
                (
                    Cell(f"{point.rate:.4g}"),
                    Cell(f"{point.rate / num_accelerators:.3g}"),
                    Cell(kind),
                    Cell(f"{share.num:,}"),
                    Cell(f"{share.share:.2%}" if share.num else "-"),
                    Cell(between(share.low, share.high, "share")),
                    verdict,
                    Cell("" if point.verdict.is_sure else "undecided"),
                )
            )
    head = ("rate /s", "per accelerator", "kind", "n", "attainment", "95 %", "verdict", "")
    _show_tables(console, [Table("points", "Rates", head, tuple(rows))])


def show_goodput(console: Console, goodput: Goodput) -> None:
    """Where a search ended."""
    low, high = goodput.per_accelerator
    if goodput.low is None:
        found = f"below {goodput.high:.4g} requests/s, the lowest rate tried"
    elif goodput.high is None:
        found = f"above {goodput.low:.4g} requests/s, the highest rate tried"
    else:
        found = f"between {goodput.low:.4g} and {goodput.high:.4g} requests/s"
    ends = " to ".join("?" if end is None else f"{end:.4g}" for end in (low, high))
    console.print(
        f"[bold]goodput {found}[/bold]; per accelerator, of {goodput.num_accelerators}: {ends}"
    )


# ---- while a run goes on -----------------------------------------------------------------------


@contextmanager
def watched(console: Console, title: str) -> Iterator[OnProgress]:
    """Shows a bar while a run goes on. The first interrupt ends the run early, keeping its records.

    Yields:
        What the run is to call with its progress.
    """
    is_asked = False

    def ask(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signal's form
        nonlocal is_asked
        is_asked = True
        signal.signal(signal.SIGINT, before)  # the second one interrupts

    before = signal.signal(signal.SIGINT, ask)
    recent: deque[float] = deque(maxlen=NUM_RECENT)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(title, total=1, state="preparing")

        def show_progress(progress: RunProgress) -> bool:
            recent.extend(progress.ttfts_s)
            num_ended = sum(progress.outcomes.values())
            state = _state(progress, sorted(recent))
            bar.update(task, total=progress.num_planned, completed=num_ended, state=state)
            return is_asked

        try:
            yield show_progress
        finally:
            signal.signal(signal.SIGINT, before)


def _state(progress: RunProgress, ttfts_s: Sequence[float]) -> str:
    parts = [f"{progress.num_in_flight} in flight", f"{progress.num_tokens} tokens"]
    if ttfts_s:
        parts.append(
            f"TTFT {seconds(percentile(ttfts_s, 0.5))}, p90 {seconds(percentile(ttfts_s, 0.9))}"
        )
    failed = {name: n for name, n in progress.outcomes.items() if name not in ("ok", "cancelled")}
    parts += [f"[red]{count} {name}[/red]" for name, count in sorted(failed.items())]
    return ", ".join(parts)
