"""The report as one HTML file that loads nothing: styles, script and drawings are in it.

It is complete without its script, which only folds panels into tabs, shows what a mark means, and
switches the theme.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

from bench.load.analysis.slo import Objective
from bench.load.record import Manifest
from bench.report.build import Item, Report, Section
from bench.report.drawing.markup import node
from bench.report.drawing.plot import Plot
from bench.report.drawing.scale import seconds
from bench.report.drawing.svg import NARROW, PAGE_STYLE, WIDE, draw
from bench.report.drawing.table import Cell, Table
from bench.report.runs import Run, slo_of

SCRIPT = Path(__file__).parent / "page.js"
WORDS = {
    "VALID": "The driver kept its schedule, and every check of the run passed.",
    "INVALID": "Do not quote these figures:",
    "UNAUDITED": "Made by another harness; nothing is known of how it kept its schedule.",
}
LONG_BELOW = 16  # characters: a longer remark may break


def render(report: Report) -> str:
    """The whole file."""
    title = _title(report)
    head = node(
        "head",
        node("meta", charset="utf-8"),
        node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        node("title", title),
        node("style", PAGE_STYLE.read_text(encoding="utf-8")),
    )
    main = node("main", *(_section(section) for section in report.sections))
    script = node("script", SCRIPT.read_text(encoding="utf-8"))
    body = node("body", _header(report, title), main, _footer(report), script)
    page = node("html", head, body, lang="en")
    return "<!doctype html>\n" + tostring(page, encoding="unicode", method="html") + "\n"


def _title(report: Report) -> str:
    names = {str(target.get("name", "")) for run in report.runs for target in run.manifest.targets}
    return f"Load report: {', '.join(sorted(names)) or 'no target'}"


def _header(report: Report, title: str) -> Element:
    nav = [node("a", section.title, href=f"#{section.key}") for section in report.sections]
    theme = node("button", "theme", class_="theme", type="button", hidden="")
    return node(
        "header",
        node(
            "div",
            node("div", node("h1", title), theme, class_="top"),
            _verdict(report),
            node("div", node("dl", *_facts(report.runs)), class_="panel"),
            node("nav", *nav),
        ),
    )


def _verdict(report: Report) -> Element:
    verdict = report.verdict
    kind = f"panel verdict {verdict.word.lower()}"
    words = WORDS[verdict.word]
    children = [node("div", node("span", verdict.word, class_="badge"), words)]
    if verdict.reasons:
        children.append(node("ul", *(node("li", reason) for reason in verdict.reasons)))
    children += [node("p", note, class_="note") for note in verdict.notes]
    return node("div", *children, class_=kind)


def _facts(runs: Sequence[Run]) -> Iterator[Element]:
    """What was run, on what: each fact once, however many runs share it."""
    for name, values in _fact_values(runs):
        distinct = list(dict.fromkeys(value for value in values if value))
        if not distinct:
            continue
        is_code = name in ("command", "schedule")
        yield node("dt", name)
        shown = distinct[:6] + ([f"and {len(distinct) - 6} more"] if len(distinct) > 6 else [])
        lines = [node("div", node("code", text) if is_code else text) for text in shown]
        yield node("dd", *lines)


def _fact_values(runs: Sequence[Run]) -> Iterator[tuple[str, list[str]]]:
    manifests = [run.manifest for run in runs]
    yield "targets", [_target(target) for one in manifests for target in one.targets]
    yield "workload", [_described(one.workload) for one in manifests]
    yield "arrivals", [_described(one.arrival) for one in manifests]
    yield "objectives", [line for one in manifests for line in _objectives(one)]
    yield "command", [one.command for one in manifests]
    yield "seed", [str(one.seed) for one in manifests]
    yield "machine", [_machine(one.environment) for one in manifests]
    yield "started", [one.started_at for one in manifests]
    yield "send lag", [_lag(one.send_lag) for one in manifests]
    yield "schedule", [f"sha256 {one.schedule_sha256[:16]}" for one in manifests]
    yield "metrics", [f"version {one.metrics_version}" for one in manifests]


def _target(target: dict[str, object]) -> str:
    rest = [f"{target[key]}" for key in ("url", "model") if target.get(key)]
    count = target.get("num_accelerators")
    rest += [f"{count} accelerators"] if count else []
    return f"{target.get('name', '')} ({', '.join(rest)})" if rest else str(target.get("name", ""))


def _described(values: dict[str, object]) -> str:
    """``name a 1, b 2``: nested ones in brackets."""
    parts = [str(values[key]) for key in ("name", "kind") if key in values]
    for key, value in values.items():
        if key in ("name", "kind") or value is None or value == {} or value == []:
            continue
        inner = f"({_described(value)})" if isinstance(value, dict) else str(value)
        parts.append(f"{key} {inner}")
    return ", ".join(parts)


def _objectives(manifest: Manifest) -> list[str]:
    """One line per kind of request."""
    slo = slo_of(manifest)
    return ["none"] if slo is None else [_objective(*pair) for pair in slo.objectives.items()]


def _objective(kind: str, objective: Objective) -> str:
    parts = []
    for name, deadline in (("TTFT", objective.ttft), ("E2E", objective.e2e)):
        if deadline is not None:
            text = seconds(deadline.base_s)
            if deadline.per_1k_tokens_s:
                text += f" + {seconds(deadline.per_1k_tokens_s)} per 1k tokens"
            if deadline.per_1k2_s:
                text += f" + {seconds(deadline.per_1k2_s)} per (1k tokens)²"
            parts.append(f"{name} ≤ {text}")
    if objective.tpot_s is not None:
        parts.append(f"TPOT ≤ {seconds(objective.tpot_s)}")
    return f"{kind}: {', '.join(parts) or 'success'}, for {100 * objective.target:.4g} %"


def _machine(environment: dict[str, str]) -> str:
    known = ("cpu", "cores", "memory", "gpu", "system", "python", "baton-serve", "torch")
    units = {"cores": "{} cores", "gpu": "GPU {}", "python": "Python {}", "torch": "torch {}"}
    units |= {"baton-serve": "baton {}"}
    shown = [units.get(key, "{}").format(environment[key]) for key in known if key in environment]
    return ", ".join(shown)


def _lag(lag: dict[str, float]) -> str:
    return ", ".join(f"{name} {seconds(value)}" for name, value in lag.items())


def _section(section: Section) -> Element:
    children = [node("h2", section.title)]
    if section.lead:
        children.append(node("p", section.lead, class_="lead"))
    for group in section.groups:
        children.append(node("div", *(_item(item) for item in group), class_="panel"))
    return node("section", *children, id=section.key)


def _item(item: Item) -> Element:
    shown = _plot(item) if isinstance(item, Plot) else _table(item)
    children = [node("h3", item.title), *shown]
    if item.note:
        children.append(node("p", item.note, class_="note"))
    if isinstance(item, Plot) and item.table:
        children.append(_figures(item))
    attributes = {"class_": "item", "id": f"item-{item.key}", "data_tab": item.tab or item.title}
    return node("div", *children, **attributes)


def _plot(plot: Plot) -> Iterator[Element]:
    for width, name in ((WIDE, "wide"), (NARROW, "narrow")):
        drawing = draw(plot, width)
        drawing.set("class", name)
        yield drawing


def _table(table: Table) -> Iterator[Element]:
    head = node("tr", *(node("th", name, scope="col") for name in table.head))
    rows = [
        node("tr", *(_cell(cell, index) for index, cell in enumerate(row))) for row in table.rows
    ]
    inner = node("table", node("thead", head), node("tbody", *rows))
    if table.words:
        inner.set("class", "words")
    yield node("div", inner, class_="scroll")


def _cell(cell: Cell, index: int) -> Element:
    children: list[Element | str] = [node("b", cell.text) if index else cell.text]
    if cell.below:
        wraps = "below wrap" if len(cell.below) > LONG_BELOW else "below"
        children.append(node("span", cell.below, class_=wraps))
    attributes = {"class_": cell.tone} if cell.tone else {}
    if index == 0:
        return node("th", *children, scope="row", **attributes)
    return node("td", *children, **attributes)


def _figures(plot: Plot) -> Element:
    """The plot's figures as a table, for those who cannot see it."""
    head, *rows = plot.table
    cells = tuple(tuple(Cell(text) for text in row) for row in rows)
    table = Table(plot.key, plot.title, head, cells)
    return node("details", node("summary", "figures"), *_table(table))


def _footer(report: Report) -> Element:
    runs = ", ".join(run.folder.name for run in report.runs)
    return node(
        "footer",
        f"Made by baton bench report from {runs}. Definitions: docs/metrics.md. This file loads "
        "nothing from anywhere.",
    )
