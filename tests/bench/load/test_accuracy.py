"""Against a server with known behaviour: what is reported is what happened.

Runs are real: a toy server in one process, the driver in another. A machine that is busy elsewhere
spoils a run, never in the harness's favour, and both processes measure how late they were.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from bench.load.analysis.metrics import summarise
from bench.load.analysis.slo import Deadline, Objective, Slo
from bench.load.driving.driver import Progress
from bench.load.driving.target import discover
from bench.load.record import Manifest, RequestRecord, read_run, write_run
from bench.load.run import Plan, execute
from bench.load.workload.prompts import Dialect
from bench.load.workload.schedule import Planned, Schedule
from bench.load.workload.sessions import Segment, Turn
from tests.bench.toy_server import ToyConfig

START = Callable[..., str]
ATTEMPTS = 8
SLO = Slo({"default": Objective(Deadline(0.04, 0.02), 0.011)})


def _schedule(num: int, rate: float, max_prompt: int, max_output: int) -> Schedule:
    random = Random(4)
    return Schedule(
        1,
        0,
        tuple(
            Planned(
                n,
                f"s{n}",
                n / rate,
                0,
                Turn(
                    "request",
                    (Segment(f"p{n}", random.randint(1, max_prompt)),),
                    random.randint(2, max_output),
                ),
            )
            for n in range(num)
        ),
    )


def _ideal(record: RequestRecord, config: ToyConfig) -> RequestRecord:
    """The record that a perfect driver would have written."""
    first = record.intended_s + config.prefill_s(record.num_prompt_tokens)
    times = tuple(first + n * config.token_s for n in range(record.max_tokens))
    return RequestRecord(
        target=record.target,
        index=record.index,
        session=record.session,
        turn=0,
        kind=record.kind,
        intended_s=record.intended_s,
        sent_s=record.intended_s,
        token_times_s=times,
        token_counts=(1,) * len(times),
        finished_s=times[-1],
        num_prompt_tokens=record.num_prompt_tokens,
        num_output_tokens=record.max_tokens,
        outcome="ok",
    )


def _errors(records: list[RequestRecord], config: ToyConfig) -> list[str]:
    """Every figure that is off by more than 1 ms and more than 1 %."""
    measured = summarise(records, SLO)
    expected = summarise([_ideal(record, config) for record in records], SLO)
    wrong = []
    for name, truth in expected.metrics.items():
        found = measured.metrics[name]
        assert found.count == truth.count
        for point in ("mean", "p50", "p90", "p99"):
            is_, should = getattr(found, point), getattr(truth, point)
            assert (is_ is None) == (should is None)
            if is_ is not None and abs(is_ - should) > max(1e-3, 0.01 * abs(should)):
                wrong.append(f"{name} {point}: {is_:.5f}, not {should:.5f}")
    for name in ("offered_requests", "completed_requests", "prompt_tokens", "output_tokens"):
        is_, should = getattr(measured.throughput, name), getattr(expected.throughput, name)
        if abs(is_ - should) > 0.01 * should:
            wrong.append(f"{name}: {is_:.3f}, not {should:.3f}")
    return wrong


def _toy_lag_s(url: str) -> float:
    """How late an event of the toy's has left at the most."""
    served = httpx.get(f"{url}/toy/log").json()
    return max(
        left - due
        for entry in served
        for left, due in zip(entry["left"], entry["due"], strict=True)
    )


def _share_waiting(records: list[RequestRecord], seconds: float) -> float:
    """Of all users, those who waited longer than this for a first token."""
    return sum(r.token_times_s[0] - r.intended_s > seconds for r in records) / len(records)


def _measure(toy: START) -> tuple[list[str], float, Manifest, list[RequestRecord]]:
    """(figures that are off, how late anybody was at the most, manifest, records) of one run."""
    config = ToyConfig(base_s=0.02, prefill_s_per_1k=0.02, token_s=0.01)
    schedule = _schedule(320, 200.0, 1000, 12)
    plan = Plan(discover(toy(config), Dialect("")), schedule, {}, {}, SLO, wants_timelines=False)
    manifest, records = execute(plan)
    assert {record.outcome for record in records} == {"ok"}
    late_s = max(
        manifest.send_lag["max"], manifest.driver["loop_lag_s"], _toy_lag_s(plan.target.url)
    )
    return _errors(records, config), late_s, manifest, records


def test_a_figure_that_is_off_has_a_cause_that_was_measured(toy: START, tmp_path: Path) -> None:
    """On an idle machine that is: no figure is off by more than a millisecond or a percent."""
    wrong, late_s, manifest, records = _measure(toy)
    assert not wrong or late_s > 1e-3, wrong
    assert summarise(records).metrics["ttft_s"].p99 is not None
    write_run(tmp_path, manifest, records)
    assert summarise(read_run(tmp_path)[1], SLO) == summarise(records, SLO)


@pytest.mark.slow
def test_every_metric_within_a_millisecond_or_a_percent(toy: START) -> None:
    for _ in range(ATTEMPTS):
        wrong, late_s, _, _ = _measure(toy)
        if not wrong:
            return
        assert late_s > 1e-3, wrong
    pytest.fail(f"not once in {ATTEMPTS} runs was this machine idle: {wrong}")


@pytest.mark.parametrize(
    ("stall_s", "rate", "length_s"),
    [
        pytest.param(2.0, 100.0, 5.0, id="2s"),
        pytest.param(10.0, 50.0, 20.0, id="10s", marks=pytest.mark.slow),
    ],
)
def test_a_stall_shows_and_a_closed_loop_hides_it(
    toy: START, stall_s: float, rate: float, length_s: float
) -> None:
    config = ToyConfig(0.004, prefill_s_per_1k=0.0, token_s=0.001, stalls=((0.8, stall_s),))

    def run(**more: Any) -> tuple[Manifest, list[RequestRecord]]:
        target = discover(toy(config), Dialect(""))
        restarts: list[httpx.Response] = []

        def restart_once(progress: Progress) -> bool:
            if not restarts and progress.num_sent:  # the stall is meant for this run
                restarts.append(httpx.get(f"{target.url}/toy/restart"))
            return False

        num = 20_000 if more else int(rate * length_s)
        schedule = _schedule(num, rate, 8, 3)
        plan = Plan(target, schedule, {}, {}, SLO, wants_timelines=False, **more)
        return execute(plan, restart_once)

    with ThreadPoolExecutor() as pool:
        open_run = pool.submit(run)
        closed_run = pool.submit(run, loop="closed", num_users=3, duration_s=length_s)
    manifest, records = open_run.result()
    assert manifest.driver["loop"] == "open"
    # Users come evenly: of `length_s` seconds' users, those of `stall_s` seconds wait, the first
    # for all of it. One in a hundred of all waits longer than p99.
    true_p99_s = stall_s - 0.01 * length_s
    p99_s = summarise(records).metrics["ttft_s"].p99
    assert p99_s is not None
    assert 0.98 * true_p99_s < p99_s < true_p99_s + 1.0  # later only where the machine is busy
    assert _share_waiting(records, stall_s / 2) > 0.8 * (stall_s / 2) / length_s

    manifest, records = closed_run.result()
    assert manifest.driver["loop"] == "closed"
    hidden_s = summarise(records).metrics["ttft_s"].p99
    assert hidden_s is not None
    assert hidden_s < 0.75 * stall_s  # three of several hundred saw it
    assert _share_waiting(records, stall_s / 2) < 0.02
    assert max(r.token_times_s[0] - r.intended_s for r in records) > 0.8 * stall_s
