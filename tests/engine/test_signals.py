"""What a rank's process does when it is asked to end, and by whom."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from engine.boot import EXIT_CLEAN, FAREWELL_S
from launcher.supervise.forks import ForkedProcess
from protocol.process.ending import END
from tests.forks import end, shared_forks

DEADLINE_S = 60.0


@pytest.fixture
def ranks() -> Iterator[list[ForkedProcess]]:
    """Three that a launcher has started, and that are ready."""
    parent_pid, forks = str(os.getpid()), shared_forks()
    started = [
        forks.start("tests.engine.signalled_rank", parent_pid, environment=os.environ)
        for _ in range(3)
    ]
    for rank in started:
        assert rank.stdout.readline() == b"ready\n"
    yield started
    for rank in started:
        end(rank)


def test_it_ends_when_the_launcher_says_so_or_nobody_does(ranks: list[ForkedProcess]) -> None:
    told, asked_twice, asked_once = ranks
    asked_once.send_signal(signal.SIGTERM)
    asked_at = time.monotonic()
    told.send_signal(END)
    asked_twice.send_signal(signal.SIGINT)
    assert told.wait(DEADLINE_S) == EXIT_CLEAN
    asked_twice.send_signal(signal.SIGINT)
    assert asked_twice.wait(DEADLINE_S) == EXIT_CLEAN
    assert asked_once.wait(DEADLINE_S) == EXIT_CLEAN
    assert time.monotonic() - asked_at >= FAREWELL_S, "the coordinator says when, or nobody does"
