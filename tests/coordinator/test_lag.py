"""The event loop's lag, the clock without its stalls, and what both are told to the world."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.loop.core_wait import CoreWait
from coordinator.loop.lag import INTERVAL_S, STALL_S, TOLERANCE_S, WINDOW_S, LoopLag

LAGS_MS = st.integers(0, 60_000).filter(lambda ms: ms != STALL_S * 1000)
LAGS = st.lists(LAGS_MS.map(lambda ms: ms / 1000), min_size=1, max_size=40)


def run(lags: Sequence[float]) -> tuple[LoopLag, list[tuple[float, float]]]:
    """A loop whose timer fires so late each time, and when it did."""
    lag, now, fired = LoopLag(), 0.0, []
    lag.fired(now)
    for late_s in lags:
        now += INTERVAL_S + late_s
        lag.fired(now)
        fired.append((now, late_s))
    return lag, fired


@given(lags=LAGS, later=st.floats(0.0, 40.0), within=st.floats(0.0, WINDOW_S))
def test_the_largest_lag_of_a_window(lags: list[float], later: float, within: float) -> None:
    lag, fired = run(lags)
    now = fired[-1][0] + later
    recent = [late_s for when, late_s in fired if now - when <= within]
    assert lag.largest(now, within) == pytest.approx(max([*recent, later - INTERVAL_S, 0.0]))
    assert lag.num_stalls == sum(late_s > STALL_S for late_s in lags)


@given(lags=LAGS, looks=st.lists(st.floats(0.0, 1.0), min_size=40, max_size=40))
def test_a_clock_that_stands_still_while_the_loop_does(
    lags: list[float], looks: list[float]
) -> None:
    """It never goes back, and never advances by more than what the loop ran and the tolerance."""
    lag, now, shown = LoopLag(), 0.0, 0.0
    lag.fired(now)
    for late_s, look in zip(lags, looks, strict=False):
        pause = INTERVAL_S + late_s
        before = shown
        for moment in (now + pause * look, now + pause):
            assert lag.observed(moment) >= shown - 1e-9
            shown = lag.observed(moment)
        now += pause
        lag.fired(now)
        assert lag.observed(now) == pytest.approx(shown)
        assert shown - before == pytest.approx(min(pause, INTERVAL_S + TOLERANCE_S))


@given(lags=LAGS, shares=st.lists(st.floats(0.0, 1.0), min_size=40, max_size=40))
def test_a_step_is_the_part_of_a_lag_without_waiting_for_a_core(
    lags: list[float], shares: list[float]
) -> None:
    lag, now, waited_s, steps = LoopLag(), 0.0, 7.0, []
    lag.fired(now, waited_s)
    for late_s, share in zip(lags, shares, strict=False):
        now, waited_s = now + INTERVAL_S + late_s, waited_s + share * late_s
        lag.fired(now, waited_s)
        steps.append((now, late_s - share * late_s))
    recent = [step_s for when, step_s in steps if now - when <= WINDOW_S]
    assert lag.longest_step_s(now) == pytest.approx(max([*recent, 0.0]))


def test_a_thread_that_has_waited_for_a_core_knows_it() -> None:
    with contextlib.closing(CoreWait()) as core:
        before = core.waited_s()
        rivals = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
        try:
            own = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {min(own)})
            for rival in rivals:
                os.sched_setaffinity(rival.pid, {min(own)})
            deadline = time.monotonic() + 20
            while core.waited_s() < before + 0.05:
                assert time.monotonic() < deadline, "four on one core"
        finally:
            os.sched_setaffinity(0, own)
            for rival in rivals:
                rival.kill()
                rival.wait()
    core.close()


def test_a_stalled_loop_is_told_and_not_ready(start_coordinator: Any, tmp_path: Path) -> None:
    with start_coordinator(
        tmp_path, failpoints="loop.reserve:hold=1.5@2", max_loop_lag_s=1.0
    ) as running:
        assert running.client.get("/ready").status_code == 200
        assert running.complete("hello", max_tokens=2).status_code == 200
        before = figures(running)
        running.complete("again", max_tokens=2)
        after = figures(running)
        assert after["loop_lag_seconds"] > 1.4, "the lag of the GIL that was held"
        assert STALL_S < after["loop_step_seconds"] <= after["loop_lag_seconds"]
        assert after["loop_stalls_total"] > before["loop_stalls_total"]
        state = running.state()
        assert state["loop"]["lag_s"] > 1.4
        assert state["counters"]["failpoint:loop.reserve:hold"] == 1
        ready = running.client.get("/ready")
        assert (ready.status_code, ready.json()["code"]) == (503, "overloaded")
        assert running.client.get("/health").status_code == 200
        assert running.complete("it is served all the same", max_tokens=2).status_code == 200
        deadline = time.monotonic() + 15
        while running.client.get("/ready").status_code != 200:
            assert time.monotonic() < deadline, "it recovers"
            threading.Event().wait(0.1)


def figures(running: Any) -> dict[str, float]:
    """The loop's figures of ``/metrics``."""
    prefix = "baton_coordinator_"
    lines = running.client.get("/metrics").text.splitlines()
    pairs = (line.removeprefix(prefix).split() for line in lines if line.startswith(prefix))
    return {name: float(value) for name, value in pairs}
