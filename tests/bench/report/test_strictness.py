"""Attainment against the scale of the objectives: known latencies, known steps."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from bench.load.record import RequestRecord
from bench.report.drawing.plot import Band, Line, Plot, Rule
from bench.report.figures.load_points import load_points
from bench.report.figures.strictness import FACTORS, attainment_by_scale
from bench.report.runs import Run, sides_of
from tests.bench.example import sample_run, sample_runs
from tests.bench.records import record

SLO = {"default": {"ttft_ms": 100, "tpot_ms": 50, "target": 0.9}}


def _record(index: int, ttft_s: float, tpot_s: float, outcome: str = "ok") -> RequestRecord:
    return record(index, ttft_s, gaps_s=(tpot_s,), at_s=float(index), outcome=outcome)


def _plot(records: list[RequestRecord], slo: dict[str, object] | None = None) -> Plot:
    manifest = msgspec.structs.replace(
        sample_run(0, 1.0, 1.0)[0],
        targets=[{"name": "t", "url": "", "model": ""}],
        arrival={"rate": 1.0},
        slo=slo or SLO,
    )
    (points,) = load_points(sides_of([Run(Path("r"), manifest, records)])).values()
    return attainment_by_scale(points)


def _curve(plot: Plot, part: str) -> dict[float, float]:
    (line,) = [one for one in plot.layers if isinstance(one, Line) and one.name.endswith(part)]
    return dict(line.points)


def test_curves_step_where_requests_begin_to_attain() -> None:
    """TTFT is 40 ms or 180 ms of 100, TPOT 30 ms of 50; one of four has failed."""
    records = [_record(0, 0.04, 0.03), _record(1, 0.18, 0.03), _record(2, 0.18, 0.03)]
    records.append(_record(3, 0.01, 0.01, "http_error"))
    plot = _plot(records)
    joint, ttft, tpot = (_curve(plot, part) for part in ("joint", "TTFT only", "TPOT only"))
    for factor in FACTORS:
        assert ttft[factor] == 0.25 * (factor >= 0.4) + 0.5 * (factor >= 1.8), factor
        assert tpot[factor] == 0.75 * (factor >= 0.6), factor
        assert joint[factor] == 0.25 * (factor >= 0.6) + 0.5 * (factor >= 1.8), factor
    assert (min(FACTORS), max(FACTORS)) == (0.25, 4.0)
    (band,) = [layer for layer in plot.layers if isinstance(layer, Band)]
    for factor, low, high in band.points:
        assert 0.0 <= low <= joint[factor] <= high <= 1.0
        assert low < high


def test_at_scale_one_it_is_the_attainment_of_the_rate() -> None:
    sides = sides_of(sample_runs(0, (6,)))
    for points in load_points(sides).values():
        plot = attainment_by_scale(points)
        for part in ("joint", "TTFT", "TPOT"):
            name = part if part == "joint" else f"{part} only"
            assert _curve(plot, f", {name}")[1.0] == points[0].share(part).share
        curve = [share for _, share in sorted(_curve(plot, "joint").items())]
        assert curve == sorted(curve)


def test_lines_at_90_and_99_percent_and_at_the_promise() -> None:
    labels = {rule.label for rule in _plot([_record(0, 0.1, 0.1)]).layers if isinstance(rule, Rule)}
    assert labels == {"target 90 %", "99 %", "as promised"}
    strict = {"default": {"ttft_ms": 100, "target": 0.95}}
    rules = [r.label for r in _plot([_record(0, 0.1, 0.1)], strict).layers if isinstance(r, Rule)]
    assert rules == ["90 %", "target 95 %", "99 %", "as promised"]


@pytest.mark.parametrize("slo", [None, {"default": {"target": 0.9}}])
def test_without_a_bound_there_is_nothing_to_scale(slo: dict[str, object] | None) -> None:
    sides = sides_of(sample_runs(0, (2,)))
    bare = [replace(side, run=side.run, slo=None) for side in sides]
    points = [point for own in load_points(bare).values() for point in own]
    plot = attainment_by_scale(points) if slo is None else _plot([_record(0, 0.1, 0.1)], slo)
    assert plot.is_empty
    assert plot.table == ()
