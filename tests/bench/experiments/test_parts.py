"""What all experiments stand on: traffic, estimates, step times, pools and reports."""

import json
import math
import statistics
from itertools import pairwise
from pathlib import Path

import pytest
import scipy.stats

from bench.simulate.cluster import Cluster, ClusterSetting
from bench.simulate.estimates import (
    T_975,
    difference,
    mean_of,
    percentile,
    pick,
    ratio,
    short,
    wilson,
)
from bench.simulate.pools import DecodeSetting, PrefillSetting, seeded
from bench.simulate.report import VIRTUAL, NullCase, Report, Scale, Table, save
from bench.simulate.step_time import MEASURED, ROOFLINE, Grid, StepTime
from bench.simulate.workload import Arrival, Lengths, Mix, draw, poisson, zipf_weights

CHAT = Mix("chat", 1.0, Lengths(200, 1.0), Lengths(40, 1.0, 400))


def test_intervals_are_students() -> None:
    quantiles = [float(scipy.stats.t.ppf(0.975, df)) for df in range(1, len(T_975) + 1)]
    assert quantiles == pytest.approx(T_975, abs=1e-4)
    found = mean_of([1.0, 2.0, 4.0])
    low, high = scipy.stats.t.interval(
        0.95, 2, statistics.fmean([1, 2, 4]), scipy.stats.sem([1, 2, 4])
    )
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-4)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    random = seeded("coverage")
    hits = sum(
        not mean_of([random.gauss(3.0, 1.0) for _ in range(5)]).excludes(3.0) for _ in range(1000)
    )
    assert 930 <= hits <= 970


def test_a_paired_effect_does_not_see_what_both_share() -> None:
    shared = [1.0, 10.0, 100.0]
    found = ratio([2 * value for value in shared], shared)
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
    assert difference([value + 1 for value in shared], shared).value == pytest.approx(1.0)


def test_small_figures() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile(list(range(1, 101)), 0.99) == 99
    assert wilson(190, 200) == pytest.approx((0.9104, 0.9726), abs=1e-4)
    assert [short(value) for value in (0.0, 1234.5, 12.34, 0.012345)] == [
        "0", "1234", "12.3", "0.0123",
    ]  # fmt: skip
    rows: list[dict[str, float]] = [{"a": 1, "x": 2.0}, {"a": 2, "x": 3.0}, {"a": 1}]
    assert pick(rows, "x", a=1) == [2.0]


def test_lengths_have_the_mean_and_variation_that_were_asked_for() -> None:
    random = seeded("lengths")
    drawn = [Lengths(500, 0.8).draw(random) for _ in range(20_000)]
    assert statistics.fmean(drawn) == pytest.approx(500, rel=0.02)
    assert statistics.pstdev(drawn) / statistics.fmean(drawn) == pytest.approx(0.8, rel=0.05)
    assert {Lengths(500, 0).draw(random) for _ in range(3)} == {500}


def test_arrivals_are_poisson_and_drawn_from_the_seed_alone() -> None:
    moments = [moment for moment, _ in zip(poisson(seeded("p"), 4.0), range(10_000), strict=False)]
    gaps = [later - earlier for earlier, later in pairwise(moments)]
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.pstdev(gaps) == pytest.approx(0.25, rel=0.05)
    again = [draw(seeded("t", 1), 2.0, 20, [CHAT]) for _ in range(2)]
    assert again[0] == again[1] != draw(seeded("t", 2), 2.0, 20, [CHAT])
    assert zipf_weights(3, 1.0) == pytest.approx([1, 1 / 2, 1 / 3])


def test_prompts_share_their_prefix_and_nothing_else() -> None:
    one, other = (Arrival(n, 0.0, 100, 1, prefix=3, num_prefix_tokens=64) for n in (1, 2))
    assert one.prompt()[:64] == other.prompt()[:64]
    assert one.prompt()[64] != other.prompt()[64]
    assert len(one.prompt()) == len(Arrival(5, 0.0, 100, 1).prompt()) == 100


def test_a_grid_is_linear_between_and_beyond_its_points() -> None:
    grid = Grid((0, 10, 20), (0, 100), ((0, 1), (10, 11), (40, 41)))
    assert grid.at(10, 100) == 11
    assert grid.at(5, 50) == pytest.approx(5.5)
    assert grid.at(30, 200) == pytest.approx(72)


@pytest.mark.parametrize("steps", [MEASURED, ROOFLINE], ids=lambda steps: steps.name)
def test_more_work_takes_longer(steps: StepTime) -> None:
    assert steps.step_s(2, 200, []) < steps.step_s(32, 3200, []) < steps.step_s(32, 64000, [])
    assert steps.chunk_s(512, 0, 1) < steps.chunk_s(1024, 0, 1) < steps.chunk_s(1024, 4096, 1)
    assert steps.chunk_s(4096, 0, 2) < steps.chunk_s(4096, 0, 1)
    both = steps.step_s(8, 800, [(256, 0)])
    assert max(steps.step_s(8, 800, []), steps.step_s(0, 0, [(256, 0)])) <= both
    assert both <= 1.000001 * (steps.step_s(8, 800, []) + steps.step_s(0, 0, [(256, 0)]))


@pytest.mark.parametrize("num_prefill", [0, 2])
def test_every_request_gets_all_its_tokens_and_gives_its_blocks_back(num_prefill: int) -> None:
    arrivals = draw(seeded("all"), 20.0, 60, [CHAT])
    setting = ClusterSetting(
        ROOFLINE, (DecodeSetting(num_blocks=256),) * 2, (PrefillSetting(2),) * num_prefill
    )
    cluster = Cluster(setting)
    served = cluster.run(arrivals)
    assert [len(one.token_times_s) for one in served] == [a.num_output_tokens for a in arrivals]
    assert all(one.ttft_s > 0 and min(one.itls_s, default=1.0) >= 0 for one in served)
    assert bool(num_prefill) is any(one.prefill_pool for one in served)
    cluster.world.run_until(lambda: False, math.inf)  # what is said after the last token
    for decode in cluster.decode.values():
        decode.node.check()
        assert decode.node.is_idle
    for prefill in cluster.prefill.values():
        prefill.node.check()


def test_an_idle_cluster_takes_as_long_as_the_model_says() -> None:
    (one,) = Cluster(ClusterSetting(ROOFLINE)).run([Arrival(0, 1.0, 200, 3)])
    assert one.ttft_s == pytest.approx(ROOFLINE.step_s(0, 0, [(200, 0)]), abs=1e-6)
    assert one.itls_s == pytest.approx([ROOFLINE.step_s(1, n, []) for n in (201, 202)], abs=1e-6)
    setting = ClusterSetting(ROOFLINE, prefill=(PrefillSetting(4),))
    (ringed,) = Cluster(setting).run([Arrival(0, 1.0, 8192, 3)])
    assert ringed.ttft_s == pytest.approx(ROOFLINE.chunk_s(8192, 0, 4), abs=1e-6)
    waits_s = ROOFLINE.handoff_s(8192) + ROOFLINE.step_s(1, 8193, [])
    assert ringed.itls_s[0] == pytest.approx(waits_s, abs=1e-6)


def test_a_report_is_kept_with_its_command_clock_and_null_case(tmp_path: Path) -> None:
    report = Report(
        name="toy",
        question="Is it?",
        clock=VIRTUAL,
        setting=["a setting"],
        tables=[Table("figures", ("what", "is"), (("this", "1"),))],
        nulls=[NullCase("nothing", "1.00", True), NullCase("other", "2", False)],
        reading=["it is"],
        rows=[{"seed": 0, "figure": 1.0}],
        draw=lambda figure: figure.subplots().plot([1, 2]),
    )
    save(report, tmp_path, "python -m toy", 5)
    text = (tmp_path / "toy.md").read_text()
    for part in ("python -m toy", "5 seeds", "Virtual time", "| this | 1 |", "none was seen"):
        assert part in text
    assert "do not trust" in report.text()
    head, row = map(json.loads, (tmp_path / "toy.jsonl").read_text().splitlines())
    assert head["environment"]["python"]
    assert row == {"seed": 0, "figure": 1.0}
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")
    assert Scale(5, 0.1).count(100) == 10
