"""A process logs into a stream that nobody reads, that is full, broken or closed: it goes on."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from protocol.process.line_rules import RateLimit
from protocol.process.logs import LogHandler
from protocol.process.outlets import Outlet

DEADLINE_S = 60.0
NOISE = """
import logging, sys
from protocol.process.logs import configure_logging, num_dropped_lines
configure_logging("noise")
log = logging.getLogger("noise")
for number in range(3000):
    log.warning("junk %d", number)
    log.warning("other " + "y" * 400 + str(number))  # each is a kind of its own
    print("line", number, flush=True)
    print("x" * 200, file=sys.stderr)
assert num_dropped_lines() > 2000
"""


@contextmanager
def unread_pipe() -> Iterator[int]:
    read, write = os.pipe()
    yield write
    os.close(read)
    os.close(write)


@contextmanager
def broken_pipe() -> Iterator[int]:
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@contextmanager
def full_disk() -> Iterator[int]:
    with open("/dev/full", "wb", buffering=0) as file:
        yield file.fileno()


@pytest.mark.parametrize("open_stream", [unread_pipe, broken_pipe, full_disk])
def test_a_process_that_is_not_heard_goes_on_and_ends(open_stream: object) -> None:
    with open_stream() as stream:  # type: ignore[operator]
        argv = [sys.executable, "-c", NOISE]
        process = subprocess.run(
            argv, stdout=stream, stderr=stream, timeout=DEADLINE_S, check=False
        )
    assert process.returncode == 0


def test_a_closed_stream_lends_its_number_to_nobody() -> None:
    work = (
        "import os, socket\n"
        "from protocol.process.logs import configure_logging\n"
        "configure_logging('closed')\n"
        "print('to nobody')\n"
        "os.write(7, b'%d' % socket.socket().fileno())\n"
    )
    read, write = os.pipe()
    command = f'exec {write}>&{write} 7>&{write} 1>&- 2>&- ; exec {sys.executable} -c "$0"'
    process = subprocess.run(
        ["bash", "-c", command, work], pass_fds=[write], timeout=DEADLINE_S, check=False
    )
    os.close(write)
    with open(read, "rb") as said:
        assert process.returncode == 0
        assert int(said.read()) > 2


class Lines:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.text = b""

    def write(self, data: bytes) -> int:
        self.text += data
        return len(data)


def test_a_repeated_line_is_told_by_its_number() -> None:
    lines, now = Lines(), [0.0]
    outlet = Outlet(lines)
    handler = LogHandler(outlet, RateLimit(burst=2, per_s=1.0), clock=lambda: now[0])
    logger = logging.Logger("coordinator.control")
    logger.addHandler(handler)
    for number in range(100):
        logger.warning("dropped a frame of %s", number)
    logger.warning("something else")
    now[0] = 60.0
    handler.settle()
    assert handler.num_dropped == 98
    outlet.close()
    assert lines.text.decode().splitlines() == [
        "dropped a frame of 0",
        "dropped a frame of 1",
        "something else",
        "98 more like this were dropped: coordinator.control: dropped a frame of %s",
    ]


def test_a_huge_record_and_one_that_cannot_be_formatted_end_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", True)  # libraries turn it off for everybody
    lines = Lines()
    outlet = Outlet(lines)
    logger = logging.Logger("huge")
    logger.addHandler(LogHandler(outlet, RateLimit()))
    logger.warning("%s", "z" * 10_000_000)
    logger.warning("%d", "no number")
    done = threading.Event()
    outlet.tick = done.set
    outlet.put(b"end")
    outlet.close()
    assert len(lines.text) < 100_000
    assert lines.text.endswith(b"end\n")
    assert "no number" in capsys.readouterr().err
