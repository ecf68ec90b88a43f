"""What a process looks like from outside while it computes, waits, and is stopped."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.supervise.silence import Vitals
from launcher.supervise.vitals import read_vitals

# Libzmq's threads work for it: that is not its own work.
_SENDING = """
import threading, zmq
context = zmq.Context()
inside, outside = context.socket(zmq.PULL), context.socket(zmq.PUSH)
inside.setsockopt(zmq.RCVHWM, 0)
outside.setsockopt(zmq.SNDHWM, 0)
outside.connect(f"tcp://127.0.0.1:{inside.bind_to_random_port('tcp://127.0.0.1')}")
for _ in range(1_000_000):
    outside.send(b"x" * 100)
print("ready", flush=True)
threading.Event().wait()
"""
_BUSY = "print('ready', flush=True)\nwhile True: pass"
_WAITING = "print('ready', flush=True)\nimport time; time.sleep(600)"


@contextmanager
def running(code: str) -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def looked_at(pid: int) -> Vitals:
    vitals = read_vitals(pid)
    assert vitals is not None
    return vitals


def wait_idle(pid: int) -> Vitals:
    """What it looks like once it is at rest."""
    deadline = time.monotonic() + 10
    while (vitals := looked_at(pid)).is_running:
        assert time.monotonic() < deadline
    return vitals


def test_one_that_computes() -> None:
    with running(_BUSY) as pid:
        before = looked_at(pid)
        assert before.is_running
        deadline = time.monotonic() + 10
        while looked_at(pid).cpu_s < before.cpu_s + 0.1:
            assert time.monotonic() < deadline
        os.kill(pid, signal.SIGSTOP)
        wait_idle(pid)


def test_one_that_waits() -> None:
    with running(_WAITING) as pid:
        before = wait_idle(pid)
        assert looked_at(pid) == before


def test_the_threads_of_libzmq_do_not_count() -> None:
    with running(_SENDING) as pid:
        before = wait_idle(pid)
        names = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/comm")]
        assert any(name.startswith("ZMQbg") for name in names)
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        whole_s = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        assert whole_s > before.cpu_s + 0.05
        assert looked_at(pid) == before


def test_one_that_is_gone() -> None:
    with running(_WAITING) as pid:
        pass
    assert read_vitals(pid) is None
