"""What an experiment has found, printed and kept: NAME.md, NAME.jsonl and a picture for each plot.

Every report says what clock its figures are from.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.environment import describe, headline
from bench.report.drawing.plot import Axis, Band, Layer, Line, Plot, Rule
from bench.report.drawing.svg import file_of
from bench.simulate.estimates import Estimate

VIRTUAL = (
    "Virtual time: the production coordinator, schedulers and block accounting decide; how long a "
    "step takes is a model's word, and no device computed anything."
)


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
    """Figures in words; the first column names the row."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", f"| {' | '.join(self.header)} |"]
        lines.append("| --- |" + " ---: |" * (len(self.header) - 1))
        return "\n".join(lines + [f"| {' | '.join(row)} |" for row in self.rows])


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
    setting: Sequence[str]
    tables: Sequence[Table]
    nulls: Sequence[NullCase]
    reading: Sequence[str]  # what it shows, the losses too, and what it does not
    rows: Sequence[Mapping[str, object]]
    plots: Sequence[Plot]
    live_part: str = ""  # what in it is of a running machine after all

    @property
    def clock(self) -> str:
        return f"{VIRTUAL} {self.live_part}".rstrip()

    def markdown(self, command: str, num_seeds: int) -> str:
        """For a reader, in a terminal or of the kept page."""
        parts = [
            f"# {self.question}",
            f"`{command}`, {num_seeds} seeds. {headline()}.",
            self.clock,
            _listed(self.setting),
            "\n".join(f"![{plot.title}]({plot.key}.svg)" for plot in self.plots),
            "## What it shows",
            _listed(self.reading),
            "## Null case",
            _listed([f"{null}." for null in self.nulls]),
            "## Figures",
            *(table.markdown() for table in self.tables),
        ]
        return "\n\n".join(parts) + "\n"


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def save(report: Report, folder: Path, command: str, num_seeds: int) -> None:
    """Write the files."""
    folder.mkdir(parents=True, exist_ok=True)
    text = report.markdown(command, num_seeds)
    (folder / f"{report.name}.md").write_text(text, encoding="utf-8")
    head = {
        "experiment": report.name,
        "command": command,
        "seeds": num_seeds,
        "clock": report.clock,
        "setting": list(report.setting),
        "null_cases": [str(null) for null in report.nulls],
        "environment": describe(),
    }
    lines = [json.dumps(row) for row in (head, *report.rows)]
    (folder / f"{report.name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for plot in report.plots:
        (folder / f"{plot.key}.svg").write_text(file_of(plot), encoding="utf-8")


def curves(
    key: str,
    title: str,
    axes: tuple[Axis, Axis],
    found: Mapping[str, Sequence[tuple[float, Estimate]]],
    rule: Rule | None = None,
) -> Plot:
    """A plot of estimates, each with its interval as a band, against a figure.

    Args:
        axes: across and up.
        found: (x, estimate) of each curve, by its name.
        rule: a line to compare with.
    """
    layers: list[Layer] = []
    for color, (name, points) in enumerate(found.items()):
        layers.append(Band(color, tuple((x, y.low, y.high) for x, y in points)))
        layers.append(Line(name, color, tuple((x, y.value) for x, y in points), dots=True))
    if rule is not None:
        layers.append(rule)
    return Plot(key, f"{title} (simulated)", axes[0], axes[1], tuple(layers))
