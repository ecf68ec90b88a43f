"""kill -9 at any moment: nothing acknowledged is lost, nothing is made twice, nothing is stuck."""

import itertools
import json
import os
import queue
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from coordinator.jobs.states import TABLE
from kvcache.prefix import block_salt, hash_blocks
from modeling.config import load_config

CHILD = Path(__file__).with_name("documents_child.py")
BLOCK_SIZE = 16
DEADLINE_S = 60.0
WAYS = {(state.value, after.value) for (state, _), after in TABLE.items()}


class Child:
    """One life of the process."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(CHILD), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith(b"\n"):
                self.said.put(json.loads(line))
        self.said.put(None)

    def ask(self, **fields: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(fields).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass

    def end(self, *, kill: bool) -> list[dict[str, Any]]:
        """End it; what it has said until then that was not taken."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if kill:
            self.process.kill()
        else:
            self.process.stdin.close()
        self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        self.process.stdout.close()
        self.process.stdin.close()
        rest = []
        while (line := self.said.get(timeout=DEADLINE_S)) is not None:
            rest.append(line)
        return rest


def text_of(key: str) -> str:
    number = int(key)
    begin = "The same beginning for many of them. " * (number % 3)
    return begin + f"{key} and on. " * (5 + number % 30)


def run_kills(folder: Path, num_kills: int, seed: int) -> None:
    rng = random.Random(seed)
    pause = threading.Event()
    acknowledged: dict[str, str] = {}
    asked: set[str] = set()
    for number in range(num_kills):
        child = Child(folder)
        if rng.random() < 0.7:  # else it is killed while it starts, too
            assert child.said.get(timeout=DEADLINE_S) == {"ready": True}
            pause_s = rng.uniform(0, 0.1)
        else:
            pause_s = rng.uniform(0, 0.4)
        keys = [
            str(2 * number),
            str(2 * number + 1),
            *rng.sample(sorted(asked), min(2, len(asked))),
        ]
        for key in keys:
            asked.add(key)
            child.ask(key=key, text=text_of(key), is_file=int(key) % 7 == 0)
        pause.wait(pause_s)
        for line in child.end(kill=True):
            if "made" in line:
                acknowledged[line["made"]] = _same(acknowledged, line)
    check_all(folder, asked, acknowledged)


def _same(acknowledged: dict[str, str], line: dict[str, Any]) -> str:
    document_id: str = line["id"]
    assert acknowledged.get(line["made"], document_id) == document_id, "made twice"
    return document_id


def check_all(folder: Path, asked: set[str], acknowledged: dict[str, str]) -> None:
    """A last life finishes everything; then it is looked at."""
    child = Child(folder)
    child.ask(finish=True)
    ended: dict[str, dict[str, Any]] = {}
    while True:
        line = child.said.get(timeout=DEADLINE_S)
        assert line is not None, "it has ended"
        if "finished" in line:
            break
        if "key" in line:
            assert line["key"] not in ended, "made twice"
            ended[line["key"]] = line
    child.end(kill=False)
    for key, document_id in acknowledged.items():
        assert ended[key]["id"] == document_id, "lost"
    assert ended.keys() <= asked
    fingerprint = load_config("arithmetic").fingerprint
    stored = (folder / "simulated-store").read_bytes()
    hashes = {stored[start : start + 16] for start in range(0, len(stored), 16)}
    for key, line in ended.items():
        assert line["status"] == "ready", line
        _check_events(line["events"])
        text = text_of(key).encode()
        wanted = hash_blocks(list(text), BLOCK_SIZE, block_salt(fingerprint, "salt"))
        assert set(wanted) <= hashes
    names = {path.name for path in (folder / "documents").iterdir()}
    assert names == {
        f"{line['id']}.{kind}" for line in ended.values() for kind in ("text", "tokens")
    }


def _check_events(events: list[Any]) -> None:
    numbers = [number for number, _, _ in events]
    assert numbers == list(range(1, len(numbers) + 1))
    states = [status for _, kind, status in events if kind == "state"]
    assert states[0] == "queued" and states.count("ready") == 1
    assert all(way in WAYS for way in itertools.pairwise(states)), states


def test_a_few_kills(tmp_path: Path) -> None:
    run_kills(tmp_path, 20, seed=5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_kills(tmp_path: Path) -> None:
    run_kills(tmp_path, 1000, seed=6)
