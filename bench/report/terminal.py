"""The report's figures for a terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid
from rich.text import Text

from bench.report.build import Report
from bench.report.table import Cell, Table

TONES = {"good": "green", "bad": "red", "dim": "dim", "": ""}
SECTIONS = ("summary", "comparison")


def show(console: Console, report: Report) -> None:
    """The verdict and the tables; plots are for the page."""
    verdict = report.verdict
    color = {"VALID": "green", "INVALID": "red"}.get(verdict.word, "yellow")
    console.print(f"[bold {color}]{verdict.word}[/]", highlight=False)
    for line in (*verdict.reasons, *verdict.notes):
        console.print(f"  {escape(line)}", highlight=False)
    for section in report.sections:
        if section.key not in SECTIONS:
            continue
        for group in section.groups:
            for item in group:
                if isinstance(item, Table):
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
