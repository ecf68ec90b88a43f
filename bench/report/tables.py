"""The tables of a report: metrics with their intervals, runs at a glance, and single requests."""

from collections.abc import Sequence
from math import inf
from typing import Any

from bench.load.analysis.intervals import Share
from bench.load.analysis.metrics import Distribution, e2e_of, ttft_of
from bench.load.record import OK, RequestRecord
from bench.report.drawing.plot import Unit
from bench.report.drawing.scale import between, compact, number, seconds
from bench.report.drawing.table import Cell, Table, Tone
from bench.report.runs import Run, Side
from bench.report.verdict import judge

NAMES = {
    "ttft_s": "TTFT, from the intended time",
    "ttft_sent_s": "TTFT, from sending",
    "tpot_s": "TPOT",
    "itl_s": "ITL, per token",
    "icl_s": "gap between events",
    "max_gap_s": "longest gap of a request",
    "e2e_s": "E2E, from the intended time",
    "normalized_s": "E2E per output token",
    "fluidity": "fluidity",
    "send_lag_s": "send lag of the driver",
}
PERCENTILES = ("p50", "p90", "p99")
NUM_WORST = 12
TONES: dict[str, Tone] = {"VALID": "good", "INVALID": "bad", "UNAUDITED": "dim"}


def metrics_table(side: Side) -> Table:
    """Every metric of one target: a percentile has its 95 % interval below it, or is refused."""
    rows = [
        (
            Cell(NAMES.get(name, name), "" if not found.num_failed else _failed(found)),
            Cell(f"{found.count:,}"),
            Cell(number(found.mean, _unit(name))),
            *(_percentile(found, percentile, _unit(name)) for percentile in PERCENTILES),
        )
        for name, found in side.summary.metrics.items()
    ]
    return Table(
        f"metrics-{side.color}",
        f"Metrics: {side.name}",
        ("metric", "n", "mean", *PERCENTILES),
        tuple(rows),
        "Below a percentile: its 95 % interval, for the effective number of independent values.",
        tab=side.name,
    )


def _unit(name: str) -> Unit:
    return "s" if name.endswith("_s") else "share" if name == "fluidity" else ""


def _failed(found: Distribution) -> str:
    return f"{found.num_failed} failed before, and rank above all"


def _percentile(found: Distribution, name: str, unit: Unit) -> Cell:
    if name in found.refused:
        remark = found.refused[name].replace(" of ", "\u00a0of\u00a0")
        return Cell("–", remark, "dim")  # noqa: RUF001 - an en dash
    value: float | None = getattr(found, name)
    low, high = found.interval.get(name, (-inf, inf))
    is_open = low == -inf and high == inf
    return Cell(number(value, unit), "no interval" if is_open else between(low, high, unit))


def load_table(sides: Sequence[Side]) -> Table:
    """What each target was offered, what it did of it, and whether that met the objectives."""
    rows = []
    for side in sides:
        throughput, attainment = side.summary.throughput, side.summary.attainment
        good = throughput.good_requests
        rows.append(
            (
                Cell(side.name, _accelerators(side)),
                Cell(f"{len(side.records):,}", _outcomes(side.summary.outcomes)),
                Cell(f"{throughput.offered_requests:.3g}/s"),
                Cell(f"{throughput.completed_requests:.3g}/s"),
                Cell("–" if good is None else f"{good:.3g}/s"),  # noqa: RUF001
                Cell(f"{throughput.output_tokens:,.0f}/s", _cached(side)),
                _attainment(attainment, attains=side.summary.attains),
            )
        )
    head = (
        "target",
        "requests",
        "offered",
        "answered",
        "in SLO",
        "tokens out",
        "attainment",
    )
    return Table("load", "Load and outcome", head, tuple(rows))


def _accelerators(side: Side) -> str:
    return f"{side.num_accelerators} accelerators" if side.num_accelerators > 1 else ""


def _cached(side: Side) -> str:
    """How much of the prompts was cached, beside what a cache without limits would have had."""
    share = side.summary.throughput.cached_share
    if share is None:
        return ""
    ideal = side.run.manifest.driver.get("ideal_cached_share")
    told = f"{share:.0%} of prompts cached"
    return f"{told}, {ideal:.0%} shared" if isinstance(ideal, int | float) else told


def _outcomes(outcomes: dict[str, int]) -> str:
    others = [
        f"{count} {name.replace('_', ' ')}"
        for name, count in sorted(outcomes.items())
        if name != OK
    ]
    return ", ".join([f"{outcomes.get(OK, 0):,} ok", *others])


def _attainment(share: Share | None, *, attains: bool | None) -> Cell:
    if share is None or not share.num:
        return Cell("–", "no SLO", "dim")  # noqa: RUF001
    tone: Tone = "good" if attains else "bad"
    sign = "✓" if attains else "✗"
    return Cell(f"{sign} {share.share:.1%}", between(share.low, share.high, "share"), tone)


def runs_table(runs: Sequence[Run]) -> Table:
    """All runs of the report."""
    rows = [
        (
            Cell(run.folder.name),
            Cell(", ".join(str(target.get("name", "")) for target in run.manifest.targets)),
            Cell(f"{compact(run.rate)}/s"),
            Cell(f"{len(run.records):,}"),
            Cell(seconds(run.manifest.duration_s)),
            Cell(str(run.manifest.seed)),
            Cell(judge([run]).word.lower(), "", _tone(run)),
        )
        for run in runs
    ]
    head = ("run", "targets", "rate", "requests", "duration", "seed", "verdict")
    return Table("runs", "Runs", head, tuple(rows))


def _tone(run: Run) -> Tone:
    return TONES[judge([run]).word]


def worst_table(sides: Sequence[Side]) -> Table:
    """Requests that failed, and the slowest first tokens of the others."""
    found = [(side, record) for side in sides for record in side.records]
    found.sort(key=lambda pair: _badness(pair[1]))
    rows = []
    for side, record in found[:NUM_WORST]:
        failed = record.outcome != OK
        why = f"{record.status or ''} {record.error_code}".strip()
        rows.append(
            (
                Cell(str(record.index), side.name if len(sides) > 1 else ""),
                Cell(record.kind),
                Cell(seconds(record.intended_s)),
                Cell(f"{record.num_prompt_tokens:,}"),
                Cell(seconds(ttft_of(record))),
                Cell(seconds(e2e_of(record))),
                Cell(
                    record.outcome.replace("_", " "),
                    why if failed and why else record.request_id,
                    "bad" if failed else "",
                ),
            )
        )
    head = ("request", "kind", "intended at", "prompt tokens", "TTFT", "E2E", "outcome")
    return Table("worst", "Failed and slowest requests", head, tuple(rows))


def _badness(record: RequestRecord) -> tuple[bool, float]:
    planned = record.outcome in (OK, "cancelled")
    return planned, -(ttft_of(record) or 0.0)


def kinds_table(side: Side) -> Table:
    """The target's attainment and first tokens by kind of request."""
    rows = []
    for kind, summary in side.summary.by_kind.items():
        ttft = summary.metrics.get("ttft_s")
        rows.append(
            (
                Cell(kind),
                Cell(f"{summary.num_requests:,}", _outcomes(summary.outcomes)),
                *(_kind_percentile(ttft, name) for name in PERCENTILES),
                _attainment(summary.attainment, attains=summary.attains),
                Cell("–" if summary.target is None else f"{summary.target:.0%}"),  # noqa: RUF001
            )
        )
    head = ("kind", "requests", "TTFT p50", "TTFT p90", "TTFT p99", "attainment", "target")
    return Table(f"kinds-{side.color}", f"By kind: {side.name}", head, tuple(rows), tab=side.name)


def _kind_percentile(found: Distribution | None, name: str) -> Cell:
    return Cell("–", "", "dim") if found is None else _percentile(found, name, "s")  # noqa: RUF001


def comparison_tables(comparison: dict[str, Any]) -> list[Table]:
    """The tables of ``compare.json``, one per pair of targets."""
    tables = []
    for number_of, pair in enumerate(comparison.get("pairs", [])):
        rows = tuple(_comparison_row(row) for row in pair.get("rows", []))
        title = f"{pair.get('target')} against {pair.get('base')}"
        head = ("metric", str(pair.get("base")), str(pair.get("target")), "ratio", "verdict")
        note = (
            f"Ratios below 1 are smaller values. {comparison.get('confidence', 0.95):.0%} "
            f"intervals by bootstrap over {comparison.get('num_blocks', '?')} blocks in "
            "alternation and the paired requests in them."
        )
        tables.append(Table(f"compare-{number_of}", title, head, rows, note, f"table: {title}"))
    return tables


def _comparison_row(row: dict[str, Any]) -> tuple[Cell, ...]:
    unit: Unit = row.get("unit", "")
    verdict = str(row.get("verdict", "unclear"))
    tones: dict[str, Tone] = {"better": "good", "worse": "bad"}
    ratio = row.get("ratio")
    if ratio is None:
        ratio_cell = Cell("–", str(row.get("refused", "")), "dim")  # noqa: RUF001
    else:
        low, high = row["low"], row["high"]
        ratio_cell = Cell(f"{ratio:.3f}", f"{low:.3f} to {high:.3f}")
        if row.get("is_difference"):
            points = [f"{100 * value:+.1f}" for value in (ratio, low, high)]
            ratio_cell = Cell(f"{points[0]} points", f"{points[1]} to {points[2]}")
    return (
        Cell(str(row.get("name", ""))),
        Cell(number(row.get("base"), unit)),
        Cell(number(row.get("target"), unit)),
        ratio_cell,
        Cell(verdict, "", tones.get(verdict, "dim")),
    )
