"""What a report holds, in order: sections of plots and tables."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.report.drawing.plot import Plot
from bench.report.drawing.table import Table
from bench.report.figures.cluster import has_samples, kv_use, occupancy, prompt_tokens
from bench.report.figures.compare import ratio_plots
from bench.report.figures.distributions import distributions, first_token_by_length
from bench.report.figures.documents import documents
from bench.report.figures.load import attainment, goodput, pareto, send_lag
from bench.report.figures.phases import decomposition, gantt, has_timelines, pools
from bench.report.figures.slices import slices, time_axis
from bench.report.figures.strictness import attainment_by_scale
from bench.report.focus import Focus, focus
from bench.report.runs import Run, Side, sides_of
from bench.report.tables import (
    comparison_tables,
    kinds_table,
    load_table,
    metrics_table,
    runs_table,
    worst_table,
)
from bench.report.verdict import Verdict, judge

Item = Plot | Table


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, what it says, and groups of plots and tables; a group's items are tabs."""

    key: str
    title: str
    lead: str
    groups: tuple[tuple[Item, ...], ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that is shown of some runs."""

    runs: tuple[Run, ...]
    verdict: Verdict
    sections: tuple[Section, ...]

    @property
    def plots(self) -> list[Plot]:
        return [
            item
            for section in self.sections
            for group in section.groups
            for item in group
            if isinstance(item, Plot)
        ]


def build_report(runs: Sequence[Run]) -> Report:
    """The report of all runs together. Sections without a single mark are left out."""
    sides = sides_of(runs)
    shown = focus(sides)
    detailed = shown.sides
    sections = [
        _summary(runs, shown),
        _comparison(runs),
        _load(sides, shown),
        Section(
            "latency",
            "Latency",
            shown.words + "Every plot shows all requests, not only the good ones.",
            (tuple(distributions(detailed)), tuple(first_token_by_length(detailed))),
        ),
        _phases(shown),
        _documents(shown),
        _time(shown),
        Section("requests", "Single requests", "", ((worst_table(detailed),),)),
    ]
    kept = [stripped for section in sections if (stripped := _stripped(section)).groups]
    return Report(tuple(runs), judge(runs), tuple(kept))


def _stripped(section: Section) -> Section:
    """Without empty plots and tables."""
    groups = tuple(tuple(item for item in group if not item.is_empty) for group in section.groups)
    kept = tuple(group for group in groups if group)
    return Section(section.key, section.title, section.lead, kept)


def _summary(runs: Sequence[Run], shown: Focus) -> Section:
    detailed = shown.sides
    groups: list[tuple[Item, ...]] = [(load_table(detailed),)]
    groups.append(tuple(metrics_table(side) for side in detailed))
    if any(len(side.summary.by_kind) > 1 for side in detailed):
        groups.append(tuple(kinds_table(side) for side in detailed))
    if len(runs) > 1:
        groups.insert(0, (runs_table(runs),))
    lead = shown.words + "Latencies count from the moment a request was meant to start."
    return Section("summary", "Summary", lead, tuple(groups))


def _comparison(runs: Sequence[Run]) -> Section:
    made = [run.comparison for run in runs if run.comparison]
    items: list[Item] = []
    for comparison in made:
        items += [*ratio_plots(comparison), *comparison_tables(comparison)]
    lead = "The same requests were sent to the targets in alternation, and are compared pairwise."
    return Section("comparison", "Comparison", lead, (tuple(items),))


def _load(sides: Sequence[Side], shown: Focus) -> Section:
    lead = "Rates are per accelerator: prefill, decode and idle ones count alike."
    by_scale = attainment_by_scale(shown.points)
    plots = (attainment(sides), by_scale, goodput(sides), pareto(sides))
    return Section("load", "Objectives under load", lead, tuple((plot,) for plot in plots))


def _phases(shown: Focus) -> Section:
    detailed = shown.sides
    told = [side for side in detailed if has_timelines(side)]
    lead = shown.words + (
        "The driver's clock joined with the time lines of the server."
        if told
        else "The server has told no time lines: there is the wait, and there are the tokens."
    )
    groups = (
        (decomposition(detailed),),
        tuple(gantt(side) for side in detailed),
        tuple(pools(side) for side in told),
    )
    return Section("phases", "Where the time goes", lead, groups)


def _documents(shown: Focus) -> Section:
    words = "A document is read once; what is asked about it later finds it in the cache."
    return Section("documents", "Documents", shown.words + words, (tuple(documents(shown.sides)),))


def _time(shown: Focus) -> Section:
    """One plot below the other, on one axis: a stall is to be seen from above to below."""
    sides = shown.sides
    x = time_axis(sides)
    first, in_flight, out_tokens, transfers = slices(sides, x)
    told = [side for side in sides if has_samples(side)]
    groups: tuple[tuple[Item, ...], ...] = (
        (first,),
        (in_flight,),
        tuple(occupancy(side, x) for side in told),
        tuple(kv_use(side, x) for side in told),
        (prompt_tokens(sides, x),),
        (out_tokens,),
        (transfers,),
        (send_lag(sides),),
    )
    return Section("time", "Over the run", shown.words + _untold(sides, told, transfers), groups)


def _untold(sides: Sequence[Side], told: Sequence[Side], transfers: Plot) -> str:
    """What is not there, and why."""
    silent = [side.name for side in sides if side not in told]
    found = ["All plots over the run's time have one axis."]
    if silent:
        found.append(
            f"{', '.join(silent)} told nothing of queues, KV use and prefill: only a Baton cluster "
            "does, to a run that asks for it."
        )
    if transfers.is_empty:
        found.append("No KV transfer was told.")
    return " ".join(found)
