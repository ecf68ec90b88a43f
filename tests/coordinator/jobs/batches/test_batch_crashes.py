"""A process that works on batches is killed at any moment: nothing is lost, nothing is twice."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.campaign.jobs.asked import batch_lines
from tests.campaign.jobs.checks import result_lines
from tests.coordinator.jobs.batches import lives

MAX_RUNNING = 4 + 8  # lines that a death may interrupt, those that wait for documents too


EARLY_SHARE = 0.2  # of the kills; these may come before anything is made


class Lives:
    """The process that has them."""

    def __init__(self, folder: Path) -> None:
        argv = [sys.executable, "-P", "-m", "tests.coordinator.jobs.batches.lives", str(folder)]
        root = Path(__file__).resolve().parents[4]
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
        )

    def killed_after(self, seconds: float, *, is_early: bool) -> None:
        """A life that is killed so long after it has begun, or has made a batch."""
        pid = self._begin("live")
        if not is_early:
            assert self._line() == lives.MADE
        threading.Event().wait(seconds)
        os.kill(pid, signal.SIGKILL)
        while (code := self._line()) == lives.MADE:
            continue
        assert code == -signal.SIGKILL

    def drained(self) -> None:
        """A life that is not killed, and ends with everything done."""
        self._begin("drain")
        assert self._line() == 0

    def end(self) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()
            assert self._process.wait(20) == 0

    def _begin(self, command: str) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


def check(folder: Path, num_kills: int) -> int:
    """Everything that was acknowledged is done, once; the number of batches."""
    connection = sqlite3.connect(folder / "jobs.sqlite")
    try:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        batches = {
            batch_id: json.loads(fields)
            for batch_id, fields in connection.execute(
                "SELECT job_id, body FROM job WHERE kind = 'batch'"
            )
        }
        names = {name for (name,) in connection.execute("SELECT file_id FROM file")}
        for table in ("line", "result"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    finally:
        connection.close()
    seeds = dict(line.split() for line in (folder / "acked").read_text().splitlines())
    assert seeds.keys() <= batches.keys()
    for batch_id, seed in seeds.items():
        check_batch(folder, batches[batch_id], int(seed))
    assert {path.name for path in (folder / "files").iterdir()} == names
    num_lines = lives.NUM_LINES * len(batches)
    num_asked = len((folder / "asked").read_text().splitlines())
    assert 0 <= num_asked - num_lines <= num_kills * MAX_RUNNING
    return len(seeds)


def check_batch(folder: Path, batch: dict[str, Any], seed: int) -> None:
    assert batch["state"] == "completed"
    asked = batch_lines(seed, lives.NUM_LINES)
    answers, wrong = result_lines(folder / "files", batch, asked)
    assert not wrong
    for line in asked:
        body = answers[line["custom_id"]]["body"]
        if line["url"] == "/v1/documents":
            assert body["object"] == "document"
        elif line["body"]["prompt"]:
            assert body["usage"]["completion_tokens"] == 3


def die(folder: Path, num_kills: int, seed: int) -> int:
    moments = random.Random(seed)
    process = Lives(folder)
    try:
        for _ in range(num_kills):
            is_early = moments.random() < EARLY_SHARE
            process.killed_after(moments.uniform(0, 0.4), is_early=is_early)
        process.drained()
    finally:
        process.end()
    return check(folder, num_kills)


def test_ten_deaths(tmp_path: Path) -> None:
    assert die(tmp_path, 10, seed=1) > 0


@pytest.mark.slow
def test_three_hundred_deaths(tmp_path: Path) -> None:
    assert die(tmp_path, 300, seed=2) > 50
