"""A schedule on virtual time: every token at the moment that the model of the machine says."""

from itertools import pairwise
from random import Random
from statistics import fmean, pstdev

import pytest

from bench.load.analysis.metrics import gaps_of, summarise, ttft_of
from bench.load.workload.arrival import Poisson
from bench.load.workload.lengths import count_of
from bench.load.workload.schedule import Schedule, draw
from bench.load.workload.sessions import Cancellations, Lengths, Sessions
from bench.report.build import build_report
from bench.simulate.driver import ClusterSetting, VirtualCluster, serve
from bench.simulate.example import example_runs
from bench.simulate.pools import DecodeSetting, PrefillSetting
from bench.simulate.step_time import MEASURED, ROOFLINE, Grid, StepTime
from bench.simulate.workload import Blend, lengths, traffic

CHAT = Lengths(lengths(200, 1.0), lengths(40, 1.0), "chat")
SPLIT = ClusterSetting(ROOFLINE, (DecodeSetting(num_blocks=512),) * 2, (PrefillSetting(2),) * 2)


def one(prompt: int, output: int) -> Schedule:
    return traffic(Lengths(str(prompt), str(output)), 1.0, 0, 1)


@pytest.mark.parametrize("setting", [ClusterSetting(ROOFLINE), SPLIT], ids=["whole", "split"])
def test_every_request_gets_all_its_tokens_and_gives_its_blocks_back(
    setting: ClusterSetting,
) -> None:
    schedule = traffic(CHAT, 20.0, 1, 60)
    cluster = VirtualCluster(setting)
    records = serve(cluster, schedule)
    assert [r.num_output_tokens for r in records] == [p.what.max_tokens for p in schedule.requests]
    assert [r.intended_s for r in records] == pytest.approx([p.at_s for p in schedule.requests])
    assert {record.outcome for record in records} == {"ok"}
    assert bool(setting.prefill) is any("prefill=" in record.path for record in records)
    cluster.world.run_until(lambda: False, 1e9)  # what is said after the last token
    for gang in cluster.gangs.values():
        gang.node.check()
        assert gang.node.is_idle


def test_an_idle_cluster_takes_as_long_as_the_model_says() -> None:
    (alone,) = serve(ClusterSetting(ROOFLINE), one(200, 3))
    assert ttft_of(alone) == pytest.approx(ROOFLINE.step_s(0, 0, [(200, 0)]), abs=1e-6)
    steps = [ROOFLINE.step_s(1, num, []) for num in (201, 202)]
    assert gaps_of(alone) == pytest.approx(steps, abs=1e-6)
    (ringed,) = serve(ClusterSetting(ROOFLINE, prefill=(PrefillSetting(4),)), one(8192, 3))
    assert ttft_of(ringed) == pytest.approx(ROOFLINE.chunk_s(8192, 0, 4), abs=1e-6)
    waits_s = ROOFLINE.handoff_s(8192) + ROOFLINE.step_s(1, 8193, [])
    assert gaps_of(ringed)[0] == pytest.approx(waits_s, abs=1e-6)


def test_a_turn_follows_its_answer_and_finds_what_was_said() -> None:
    chat = Sessions(first="256", message="64", turns="3", output="32", think_s="2")
    records = serve(ClusterSetting(ROOFLINE), traffic(chat, 1.0, 0, 3))
    assert [record.num_prompt_tokens for record in records] == [256, 352, 448]
    for before, after in pairwise(records):
        assert before.finished_s is not None
        assert after.intended_s == pytest.approx(before.finished_s + 2.0)
        assert (after.num_cached_tokens or 0) >= before.num_prompt_tokens


def test_users_go_away_as_planned() -> None:
    leaving = Cancellations(1.0, "0.1")
    schedule = draw(Lengths("64", "4000"), Poisson(9.0), 0, duration_s=1.0, cancellations=leaving)
    records = serve(ClusterSetting(ROOFLINE, max_tokens=8000), schedule)
    assert {record.outcome for record in records} == {"cancelled"}
    assert all(0 < record.num_output_tokens < 4000 for record in records)


def test_what_comes_back_is_a_run_like_any_other() -> None:
    records = serve(SPLIT, traffic(CHAT, 20.0, 0, 60))
    assert summarise(records).metrics["ttft_s"].p50 is not None


def test_the_example_is_a_report_of_both_clusters_with_all_that_they_told() -> None:
    (run,) = example_runs(0, (3.0,))
    report = build_report([run])
    assert report.verdict.word == "INVALID"
    plots = {plot.key for plot in report.plots}
    assert {"phases", "gantt-0", "gantt-1", "documents", "cluster-kv-0", "slices-tokens"} <= plots
    for sample in run.samples:
        for pool in sample.pools:
            for space in pool.blocks:
                assert space.free + space.held + space.cached == space.total


def test_the_seed_decides_the_traffic() -> None:
    blend = Blend(((3.0, CHAT), (1.0, Lengths("1000", "1", "long"))))
    schedules = [traffic(blend, 4.0, seed, 400) for seed in (1, 1, 2)]
    assert schedules[0] == schedules[1] != schedules[2]
    kinds = [planned.what.kind for planned in schedules[0].requests]
    assert kinds.count("long") / 400 == pytest.approx(0.25, abs=0.06)


def test_lengths_have_the_mean_and_variation_that_were_asked_for() -> None:
    random, draw_one = Random(1), count_of(lengths(500, 0.8))
    drawn = [draw_one(random) for _ in range(20_000)]
    assert fmean(drawn) == pytest.approx(500, rel=0.02)
    assert pstdev(drawn) / fmean(drawn) == pytest.approx(0.8, rel=0.05)
    assert lengths(500) == "500"


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
