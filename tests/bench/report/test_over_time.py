"""Plots over the run's time: the records' side, the cluster's side, one axis for all."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.load.record import RequestRecord
from bench.load.samples import Blocks, ClusterSample, PoolSample
from bench.report.build import build_report
from bench.report.drawing.layout import frame_of
from bench.report.drawing.plot import Line, Plot
from bench.report.drawing.svg import NARROW, WIDE
from bench.report.figures.cluster import kv_use, occupancy, prompt_tokens, rates_of
from bench.report.figures.slices import NUM_SLICES, slices, time_axis
from bench.report.runs import Run, Side, renamed, sides_of
from tests.bench.example import sample_run
from tests.bench.records import record

Points = tuple[tuple[float, float], ...]


def _pool(role: str, number: int = 0, **fields: Any) -> PoolSample:
    return PoolSample(f"{role}{number}", role, **fields)


def _side(samples: list[ClusterSample], records: tuple[RequestRecord, ...] = ()) -> Side:
    manifest, _ = sample_run(0, 1.0, 1.0)
    manifest = msgspec.structs.replace(manifest, targets=[{"name": "t"}])
    (side,) = sides_of([Run(Path("run"), manifest, records, samples=samples)])
    return side


def _at(at_s: float, *pools: PoolSample) -> ClusterSample:
    return ClusterSample("t", at_s, 0.001, 0, pools)


def _line(plot: Plot, name: str) -> Points:
    (line,) = [layer for layer in plot.layers if isinstance(layer, Line) and layer.name == name]
    return line.points


def test_running_and_waiting_are_sums_over_a_role() -> None:
    side = _side(
        [
            _at(
                1.0,
                _pool("decode", 0, num_running=2, counters={"preemptions_total": 5.0}),
                _pool("decode", 1, num_running=3, num_waiting=1),
                _pool("prefill", num_waiting=4),
                _pool("store", num_running=99),
            ),
            _at(0.0, _pool("decode", 0, counters={"preemptions_total": 2.0}), _pool("prefill")),
        ]
    )
    plot = occupancy(side, time_axis([side]))
    assert _line(plot, "decode, running") == ((0.0, 0.0), (1.0, 5.0))
    assert _line(plot, "decode, waiting") == ((0.0, 0.0), (1.0, 1.0))
    assert _line(plot, "prefill, waiting") == ((0.0, 0.0), (1.0, 4.0))
    assert len(plot.layers) == 4
    assert plot.note.endswith("Preemptions in the whole run: 3.")
    assert "No request was there" not in plot.note


def test_a_flat_line_at_zero_is_said_to_be_one() -> None:
    side = _side([_at(0.0, _pool("decode")), _at(1.0, _pool("decode"))])
    assert "No request was there at any" in occupancy(side, time_axis([side])).note


def test_kv_use_tells_what_is_held_from_what_is_cached() -> None:
    spaces = (Blocks(total=100, free=60, owned=10, in_flight=5, cached=25),)
    fuller = (Blocks(total=10, free=9, owned=1), Blocks(total=10, free=5, owned=5))
    side = _side([_at(0.0, _pool("decode", blocks=spaces), _pool("prefill", blocks=fuller))])
    plot = kv_use(side, time_axis([side]))
    assert _line(plot, "decode0, held") == ((0.0, 0.15),)
    assert _line(plot, "decode0, with cached") == ((0.0, 0.4),)
    assert _line(plot, "prefill0, held") == ((0.0, 0.5),)
    none = _side([_at(0.0, _pool("decode"), _pool("store", blocks=spaces))])
    assert kv_use(none, time_axis([none])).is_empty


def test_rates_are_over_two_seconds_and_not_over_a_restart() -> None:
    steady = rates_of(tuple((float(second), 100.0 * second) for second in range(6)))
    assert [rate for _, rate in steady] == pytest.approx([100.0] * 6)
    assert [at for at, _ in steady] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    late = rates_of(((0.0, 0.0), (1.0, 0.0), (2.0, 200.0), (3.0, 200.0), (3.1, 200.0)))
    assert max(rate for _, rate in late) == pytest.approx(100.0)  # a pool tells it all at once
    again = rates_of(((0.0, 500.0), (1.0, 600.0), (2.0, 0.0), (3.0, 100.0), (4.0, 200.0)))
    assert all(rate >= 0.0 for _, rate in again)
    assert rates_of(()) == rates_of(((1.0, 5.0),)) == ()


def test_prefill_counts_what_was_computed_wherever_it_was() -> None:
    own = [{"prefill_computed_tokens": 300.0 * second} for second in range(4)]
    other = {"prompt_tokens_total": 9e9}
    split = [
        _at(float(n), _pool("prefill", counters=c), _pool("decode", counters=other))
        for n, c in enumerate(own)
    ]
    colocated = [
        _at(
            float(n),
            _pool("decode", counters={"prompt_tokens_total": 9.0 * n, "cached_tokens_total": n}),
        )
        for n in range(4)
    ]
    for samples, rate in ((split, 300.0), (colocated, 8.0)):
        side = _side(samples)
        points = _line(prompt_tokens([side], time_axis([side])), "t")
        assert [found for _, found in points] == pytest.approx([rate] * 4)


def _moved(sent_s: float, committed: float | None, transfer: Any) -> RequestRecord:
    events = {"arrived": 0.0} | ({} if committed is None else {"committed": committed})
    told = {"requests": [{"events": events, "transfer": transfer}]}
    return record(0, None, at_s=sent_s, finished_s=96.0, timeline=told)


def test_transfers_are_spread_over_their_reads() -> None:
    records = (
        _moved(0.0, 8.0, {"num_bytes": 4_000_000, "read_s": 4.0}),  # two slices of two seconds
        _moved(90.0, 1.0, {"num_bytes": 2_000_000}),  # at once
        _moved(50.0, None, {"num_bytes": 7}),
        _moved(50.0, 1.0, None),
    )
    side = _side([], records)
    plot = slices([side], time_axis([side]))[3]
    points = dict(_line(plot, "t"))
    assert "MB/s" in plot.y.label
    assert {at: rate for at, rate in points.items() if rate} == pytest.approx(
        {4.0: 1.0, 6.0: 1.0, 90.0: 1.0}, abs=1e-5
    )
    assert slices([_side([])], time_axis([]))[3].is_empty


def test_first_tokens_have_a_median_and_a_p99_in_each_slice() -> None:
    records = tuple(
        record(index, (index + 1) / 1000, at_s=0.1, finished_s=48.0) for index in range(200)
    )
    side = _side([], records)
    plot = slices([side], time_axis([side]))[0]
    assert [y for _, y in _line(plot, "t, p50")] == pytest.approx([0.1])
    assert [y for _, y in _line(plot, "t, p99")] == pytest.approx([0.198])


def test_plots_over_time_have_one_axis(simulated: list[Run]) -> None:
    report = build_report(simulated[:1])
    (section,) = [section for section in report.sections if section.key == "time"]
    *timed, lag = section.groups
    plots = [item for group in timed for item in group if isinstance(item, Plot)]
    assert [plot.key.rstrip("01").rstrip("-") for plot in plots] == [
        *("slices-ttft", "slices-in-flight", "cluster-requests", "cluster-requests"),
        *("cluster-kv", "cluster-kv", "cluster-prompt-tokens", "slices-tokens"),
        "slices-transfers",
    ]
    assert [len(group) for group in timed] == [1, 1, 2, 2, 1, 1, 1]
    assert len({plot.x for plot in plots}) == 1
    assert lag[0].key == "send-lag"
    for width in (WIDE, NARROW):
        assert len({(frame_of(p, width).left, frame_of(p, width).right) for p in plots}) == 1
    assert all(len(layer.points) <= NUM_SLICES + 40 for p in plots for layer in _lines(p))


def _lines(plot: Plot) -> list[Line]:
    return [layer for layer in plot.layers if isinstance(layer, Line)]


def test_what_was_not_told_is_said(simulated: list[Run]) -> None:
    run = simulated[0]
    partly = [sample for sample in run.samples if sample.target == "disaggregated"]
    foreign = [msgspec.structs.replace(one, timeline=None) for one in run.records]
    leads = []
    for one in (run, replace(run, samples=partly), replace(run, samples=(), records=foreign)):
        (section,) = [s for s in build_report([one]).sections if s.key == "time"]
        leads.append(section.lead)
    assert "told nothing" not in leads[0]
    assert "colocated told nothing of queues" in leads[1]
    assert "disaggregated, colocated told nothing" in leads[2]
    assert "No KV transfer was told" in leads[2]
    titles = {plot.key: plot.title for plot in build_report([replace(run, samples=partly)]).plots}
    for key in ("cluster-prompt-tokens", "slices-transfers"):  # one line has no legend
        assert titles[key].endswith(": disaggregated")


def test_a_renamed_run_keeps_its_samples(simulated: list[Run]) -> None:
    sides = sides_of([renamed(simulated[0], "before")])
    assert [side.name for side in sides] == ["before: disaggregated", "before: colocated"]
    assert all(side.samples for side in sides)
    times = [sample.at_s for sample in sides[0].samples]
    assert times == sorted(times)
