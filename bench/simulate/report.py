"""What an experiment has found, printed and kept: NAME.md, NAME.jsonl and NAME.png.

Every report says what clock its figures are from. What was not measured on a running model carries
the word "simulated" across its plot.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.environment import describe, headline
from protocol.errors import ConfigError

VIRTUAL = (
    "Virtual time: the production schedulers, router and block accounting decide; how long a step "
    "takes is a model's word, and no device computed anything."
)
EXACT = "Exact replay: no time is involved, blocks are counted."
COLOURS = ("#1f4e79", "#c55a11", "#3a7d44", "#7f3c8d", "#b8860b", "#5f6b73", "#c0392b")


@dataclass(frozen=True, slots=True)
class Scale:
    """How much to run.

    Args:
        num_seeds: of the traffic.
        size: share of the usual number of requests; tests use little.
        live: whether to measure what needs a model or a quiet machine.
    """

    num_seeds: int = 5
    size: float = 1.0
    live: bool = True

    @property
    def seeds(self) -> range:
        return range(self.num_seeds)

    def count(self, usual: int, least: int = 1) -> int:
        return max(least, round(usual * self.size))


@dataclass(frozen=True, slots=True)
class Table:
    """Figures in words."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", f"| {' | '.join(self.header)} |"]
        lines.append("| --- |" + " ---: |" * (len(self.header) - 1))
        return "\n".join(lines + [f"| {' | '.join(row)} |" for row in self.rows])

    def text(self) -> str:
        """In columns, for a terminal."""
        widths = [
            max(len(row[column]) for row in (self.header, *self.rows))
            for column in range(len(self.header))
        ]
        lines = [self.title]
        for row in (self.header, *self.rows):
            first, *others = zip(row, widths, strict=True)
            cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
            lines.append("  " + "  ".join(cells))
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class NullCase:
    """A setting in which no effect is expected, and what was seen there."""

    what: str
    found: str
    holds: bool

    def __str__(self) -> str:
        verdict = "none was seen" if self.holds else "AN EFFECT WAS SEEN: do not trust the rest"
        return f"{self.what}: {self.found}; {verdict}"


@dataclass(frozen=True, slots=True)
class Report:
    """One experiment's result."""

    name: str
    question: str
    clock: str
    setting: Sequence[str]
    tables: Sequence[Table]
    nulls: Sequence[NullCase]
    reading: Sequence[str]  # what it shows, the losses too, and what it does not
    rows: Sequence[Mapping[str, object]]
    draw: Callable[[Any], None]  # on a matplotlib figure
    size: tuple[float, float] = (10.0, 4.2)  # of the figure, in inches
    live_part: str = ""  # what in it is of a running machine after all
    extra: Mapping[str, object] = field(default_factory=dict)

    @property
    def clocks(self) -> str:
        return f"{self.clock} {self.live_part}".rstrip()

    @property
    def is_simulated(self) -> bool:
        return self.clock == VIRTUAL

    def text(self) -> str:
        """For a terminal."""
        parts = [f"== {self.name}: {self.question}", self.clocks, *self.setting, ""]
        parts += [f"{table.text()}\n" for table in self.tables]
        parts += [f"null case: {null}" for null in self.nulls]
        return "\n".join(parts + [f"- {line}" for line in self.reading])

    def markdown(self, command: str, num_seeds: int) -> str:
        """For a reader."""
        setting = "\n".join(f"- {line}" for line in self.setting)
        nulls = "\n".join(f"- {null}." for null in self.nulls)
        reading = "\n".join(f"- {line}" for line in self.reading)
        tables = "\n\n".join(table.markdown() for table in self.tables)
        return (
            f"# {self.question}\n\n`{command}`, {num_seeds} seeds. {headline()}.\n\n"
            f"{self.clocks}\n\n{setting}\n\n![{self.name}]({self.name}.png)\n\n"
            f"## What it shows\n\n{reading}\n\n## Null case\n\n{nulls}\n\n## Figures\n\n{tables}\n"
        )


def save(report: Report, folder: Path, command: str, num_seeds: int) -> None:
    """Write the three files.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = report.markdown(command, num_seeds)
    (folder / f"{report.name}.md").write_text(text, encoding="utf-8")
    head = {
        "experiment": report.name,
        "command": command,
        "seeds": num_seeds,
        "clock": report.clocks,
        "setting": list(report.setting),
        "null_cases": [str(null) for null in report.nulls],
        "environment": describe(),
        **report.extra,
    }
    lines = [json.dumps(row) for row in (head, *report.rows)]
    (folder / f"{report.name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(report, folder / f"{report.name}.png")


def draw(report: Report, path: Path) -> None:
    """Write the plot.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # slow, and only wanted here
    except ImportError as error:
        raise ConfigError('no matplotlib: pip install "baton-serve[plots]"') from error
    figure = Figure(figsize=report.size, layout="constrained")
    report.draw(figure)
    for axes in figure.axes:
        axes.grid(visible=True, color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if report.is_simulated:
        figure.text(
            0.5, 0.5, "simulated", fontsize=56, color="#000000", alpha=0.07,
            rotation=20, ha="center", va="center", zorder=10,
        )  # fmt: skip
    figure.savefig(path, dpi=120)
