"""Slices of the campaign on real processes, as ``python -m tests.campaign`` runs it.

What a stage holds true is in the files of tests/campaign; a campaign that finds a wrong token, a
leaked block, a fault without effect or an end without excuse exits with 1.
"""

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.cluster


def _campaign(stages: str, *flags: str, minutes: float = 3.0) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "tests.campaign", "--stages", stages, "--json"]
    done = subprocess.run(
        [*command, "--minutes", str(minutes), *flags],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60 * minutes + 120,
        check=False,
    )
    assert done.stdout, f"the campaign ended with {done.returncode}"
    tally: dict[str, Any] = json.loads(done.stdout)
    assert not tally["problems"], json.dumps(tally, indent=1)
    assert done.returncode == 0
    assert tally["lies"] == {}
    assert tally["num_leaked_blocks"] == 0
    return tally


def test_clients_that_go_away_leave_nothing_behind() -> None:
    tally = _campaign("abandon", "--aborts", "80", "--requests", "100")
    phases = tally["abort_phases"]
    assert sum(phases.values()) >= 80
    assert {"queued", "transfer", "decode"} <= phases.keys()
    assert sorted(tally["free_s"])[-1] < 10, "2 s is the figure; this machine may be busy"


def test_reads_that_land_late_touch_nobody() -> None:
    tally = _campaign("landing", "--late", "10")
    assert tally["num_late_rounds"] >= 10
    assert tally["num_landed_late"] > 0


def test_changed_bytes_are_never_decoded_and_would_show() -> None:
    tally = _campaign("bytes,unchecked", "--requests", "200", "--aborts", "0")
    assert tally["faults"]["transfer.read:corrupt"] > 0
    assert tally["num_planted_seen"] > 0


def test_messages_that_come_twice_and_late_change_nothing() -> None:
    tally = _campaign("messages", "--requests", "200", "--aborts", "0")
    assert tally["faults"]["handoff.send:duplicate"] > 0
    assert tally["ends"].keys() == {"done", "left"}


def test_messages_that_are_lost_are_sent_again_and_cost_no_attempt() -> None:
    tally = _campaign("drops", "--requests", "800", "--aborts", "0")
    assert tally["faults"]["handoff.send.announce:drop"] > 0
    assert tally["ends"].keys() == {"done", "left"}


def test_messages_that_are_lost_each_time_end_attempts_and_hold_nothing() -> None:
    tally = _campaign("silence", "--requests", "100", "--aborts", "0")
    assert tally["ends"]["done"] > 0
    assert "error" in " ".join(tally["ends"])


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["nixl", "tcp"])
def test_a_longer_campaign(transport: str) -> None:
    _campaign(
        "abandon,landing,messages,drops,silence,bytes,unchecked,links",
        *("--requests", "2000", "--aborts", "600", "--late", "60", "--transport", transport),
        minutes=5.0,
    )


@pytest.mark.slow
def test_a_loop_that_stands_still() -> None:
    tally = _campaign("loop", "--faults", "40", "--aborts", "0", minutes=4.0)
    assert tally["faults"]["loop.reserve:hold"] == tally["faults"]["loop.reserve:delay"] == 1
    assert tally["detect_s"].keys() == {"hang of the loop", "stop of the loop"}


@pytest.mark.slow
def test_processes_that_stand_still_or_die() -> None:
    tally = _campaign("stops,kills", "--faults", "60", minutes=4.0)
    kinds = " ".join(tally["faults"])
    assert "SIGSTOP" in kinds
    assert "SIGKILL" in kinds
