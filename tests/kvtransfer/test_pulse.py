"""What a rank knows of its coordinator by the connection alone, with real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from protocol.sockets import Dealer, Poller, Pulse, open_context

DEADLINE_S = 15.0
PULSE = Pulse(interval_s=0.2, timeout_s=1.0)
TOKEN = "secret"


class Line:
    """A dealer, and the process that it is connected to."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", address: str) -> None:
        self.process = self._start(address)
        self.address = self._said()
        self.dealer = Dealer(context, self.address, "rank", PULSE)
        self._poller = Poller(self.dealer)

    def _start(self, address: str) -> "subprocess.Popen[str]":
        script = Path(__file__).with_name("busy_coordinator.py")
        argv = [sys.executable, str(script), TOKEN, address]
        environment = {**os.environ, "PYTHONPATH": str(script.parents[2])}
        return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment)

    def _said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def start_again(self) -> None:
        self.end()
        self.process = self._start(self.address)
        assert self._said() == self.address

    def ask(self, frame: bytes) -> None:
        """Send a frame and wait until it comes back."""
        self.dealer.send(frame)
        assert self._poller.wait(DEADLINE_S)
        assert self.dealer.receive() == frame

    def wait(self, condition: Callable[[], bool]) -> float:
        """How long it took to become true."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < DEADLINE_S
            self._poller.wait(0.01)
        return time.monotonic() - started

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(params=["ipc", "tcp"])
def line(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Line]:
    address = f"ipc://{tmp_path}/c" if request.param == "ipc" else "tcp://127.0.0.1:*"
    with open_context(TOKEN) as context:
        line = Line(context, address)
        yield line
        line.dealer.close()
        line.end()


def test_a_busy_process_lives_and_a_stopped_one_does_not(line: Line) -> None:
    line.wait(lambda: line.dealer.is_up)
    line.dealer.send(b"hold 4")
    held_until = time.monotonic() + 3.5
    line.wait(lambda: not line.dealer.is_up or time.monotonic() > held_until)
    assert line.dealer.is_up, "nobody holds the GIL of libzmq's threads"
    line.wait(lambda: line.dealer.receive() is not None)
    line.process.send_signal(signal.SIGSTOP)
    took_s = line.wait(lambda: not line.dealer.is_up)
    assert PULSE.timeout_s - PULSE.interval_s < took_s < 3 * PULSE.timeout_s
    line.process.send_signal(signal.SIGCONT)
    line.wait(lambda: line.dealer.is_up)
    line.ask(b"under the same name")
    line.process.send_signal(signal.SIGKILL)
    assert line.wait(lambda: not line.dealer.is_up) < PULSE.timeout_s, "the kernel says so at once"
    line.start_again()
    line.wait(lambda: line.dealer.is_up)
    line.ask(b"another process")
