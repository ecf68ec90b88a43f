"""What a rank's process does when it is asked to end, and by whom."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from engine.boot import EXIT_CLEAN, FAREWELL_S
from protocol.ending import END

DEADLINE_S = 60.0
_RANK = """
import signal, sys
from engine.boot import end_on_signals
from engine.rank_config import RankConfig
end_on_signals(RankConfig(
    model="arithmetic", pool_id="d", control_address="", token="", listen="ipc://",
    parent_pid=int(sys.argv[1]), shutdown_grace_s=0.0,
))
sys.stdout.write("ready\\n")
sys.stdout.flush()
while True:
    signal.pause()
"""


class Rank:
    """A process that handles signals as a rank does, and does nothing else."""

    def __init__(self, parent_pid: int) -> None:
        argv = [sys.executable, "-c", _RANK, str(parent_pid)]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE)

    def is_asked(self, number: signal.Signals) -> None:
        assert self.process.stdout is not None
        self.process.stdout.readline()
        self.process.send_signal(number)

    def ended(self) -> int:
        return self.process.wait(DEADLINE_S)


@pytest.fixture
def ranks() -> Iterator[list[Rank]]:
    """Three that a launcher has started."""
    started = [Rank(os.getpid()) for _ in range(3)]
    yield started
    for rank in started:
        rank.process.kill()
        rank.process.communicate()


def test_it_ends_when_the_launcher_says_so_or_nobody_does(ranks: list[Rank]) -> None:
    told, asked_twice, asked_once = ranks
    asked_once.is_asked(signal.SIGTERM)
    asked_at = time.monotonic()
    told.is_asked(END)
    asked_twice.is_asked(signal.SIGINT)
    assert told.ended() == EXIT_CLEAN
    asked_twice.process.send_signal(signal.SIGINT)
    assert asked_twice.ended() == EXIT_CLEAN
    assert asked_once.ended() == EXIT_CLEAN
    assert time.monotonic() - asked_at >= FAREWELL_S, "the coordinator says when, or nobody does"
