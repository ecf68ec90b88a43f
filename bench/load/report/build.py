"""What a report holds, in order: the page, the PNGs and the terminal show these sections."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.load.report.compare_figures import ratio_plots
from bench.load.report.distributions import distributions, first_token_by_length
from bench.load.report.documents import documents
from bench.load.report.load_figures import attainment, goodput, pareto, send_lag
from bench.load.report.load_points import focus
from bench.load.report.phase_figures import decomposition, gantt, has_timelines, pools
from bench.load.report.plot import Plot
from bench.load.report.runs import Run, Side, sides_of
from bench.load.report.scale import compact
from bench.load.report.slice_figures import slices
from bench.load.report.table import Table
from bench.load.report.tables import (
    comparison_tables,
    kinds_table,
    load_table,
    metrics_table,
    runs_table,
    worst_table,
)
from bench.load.report.verdict import Verdict, judge

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
    detailed = focus(sides)
    sections = [
        _summary(runs, detailed),
        _comparison(runs),
        _load(sides),
        Section(
            "latency",
            "Latency",
            _which(runs, detailed) + "Every plot shows all requests, not only the good ones.",
            (tuple(distributions(detailed)), tuple(first_token_by_length(detailed))),
        ),
        _phases(runs, detailed),
        _documents(detailed),
        Section(
            "time",
            "Over the run",
            _which(runs, detailed),
            (tuple(slices(detailed)), (send_lag(detailed),)),
        ),
        Section("requests", "Single requests", "", ((worst_table(detailed),),)),
    ]
    kept = [stripped for section in sections if (stripped := _stripped(section)).groups]
    return Report(tuple(runs), judge(runs), tuple(kept))


def _stripped(section: Section) -> Section:
    """Without empty plots and tables."""
    groups = tuple(tuple(item for item in group if not item.is_empty) for group in section.groups)
    kept = tuple(group for group in groups if group)
    return Section(section.key, section.title, section.lead, kept)


def _which(runs: Sequence[Run], detailed: Sequence[Side]) -> str:
    if len(runs) < 2 or not detailed:
        return ""
    run = detailed[0].run
    return f"Of the run {run.folder.name}, {compact(run.rate)} requests/s. "


def _summary(runs: Sequence[Run], detailed: Sequence[Side]) -> Section:
    groups: list[tuple[Item, ...]] = [(load_table(detailed),)]
    groups.append(tuple(metrics_table(side) for side in detailed))
    if any(len(side.summary.by_kind) > 1 for side in detailed):
        groups.append(tuple(kinds_table(side) for side in detailed))
    if len(runs) > 1:
        groups.insert(0, (runs_table(runs),))
    lead = _which(runs, detailed) + "Latencies count from the moment a request was meant to start."
    return Section("summary", "Summary", lead, tuple(groups))


def _comparison(runs: Sequence[Run]) -> Section:
    made = [run.comparison for run in runs if run.comparison]
    items: list[Item] = []
    for comparison in made:
        items += [*ratio_plots(comparison), *comparison_tables(comparison)]
    lead = "The same requests were sent to the targets in alternation, and are compared pairwise."
    return Section("comparison", "Comparison", lead, (tuple(items),))


def _load(sides: Sequence[Side]) -> Section:
    lead = "Rates are per accelerator: prefill, decode and idle ones count alike."
    plots = (attainment(sides), goodput(sides), pareto(sides))
    return Section("load", "Objectives under load", lead, tuple((plot,) for plot in plots))


def _phases(runs: Sequence[Run], detailed: Sequence[Side]) -> Section:
    told = [side for side in detailed if has_timelines(side)]
    lead = _which(runs, detailed) + (
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


def _documents(detailed: Sequence[Side]) -> Section:
    plot = documents(detailed)
    lead = "A document is read once; what is asked about it later finds it in the cache."
    return Section("documents", "Documents", lead, ((plot,),) if plot is not None else ())
