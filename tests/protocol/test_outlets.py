"""Lines that are not taken cost nobody anything but themselves."""

import errno
import os
import threading
import time
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.process.outlets import Descriptor, Outlet, RotatingFile

DEADLINE_S = 10.0


class Gate:
    """A sink that takes ``step`` bytes at a time while it is open, and may fail instead."""

    def __init__(self, step: int = 1 << 20) -> None:
        self.taken = bytearray()
        self.opened = threading.Event()
        self.failures = 0  # that are still to come
        self._step = step

    def write(self, data: bytes) -> int:
        if not self.opened.wait(0.05):
            return 0
        if self.failures:
            self.failures -= 1
            raise OSError(errno.ENOSPC, "full")
        self.taken += data[: self._step]
        return min(self._step, len(data))

    @property
    def lines(self) -> list[bytes]:
        return bytes(self.taken).split(b"\n")[:-1]


def notice(num_lines: int) -> bytes:
    return b"dropped %d" % num_lines


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=60), st.integers(1, 40))
def test_memory_is_bounded_and_every_line_is_written_or_counted(
    sizes: list[int], step: int
) -> None:
    gate = Gate(step)
    outlet = Outlet(gate, None, max_waiting_bytes=300)
    put = [b"%03d" % number + b"x" * size for number, size in enumerate(sizes)]
    for line in put:
        outlet.put(line)
    gate.opened.set()
    outlet.close(DEADLINE_S)
    assert len(gate.lines) + outlet.num_dropped == len(put)
    written = iter(put)
    assert all(line in written for line in gate.lines), "out of order"
    assert gate.lines[-1] == put[-1], "the newest is kept"


def test_nobody_waits_for_a_stream_that_is_not_read() -> None:
    read, write = os.pipe()
    outlet = Outlet(Descriptor(write), notice, max_waiting_bytes=10_000)
    started = time.monotonic()
    for number in range(50_000):
        outlet.put(b"line %d" % number)
    outlet.close(0.2)
    assert time.monotonic() - started < DEADLINE_S
    assert outlet.num_dropped > 10_000
    os.close(read)
    os.close(write)


def test_what_was_dropped_is_told_when_lines_are_taken_again() -> None:
    gate = Gate()
    outlet = Outlet(gate, notice, max_waiting_bytes=64)
    outlet.put(b"first")
    for number in range(20):
        outlet.put(b"%010d" % number)
    gate.opened.set()
    outlet.close(DEADLINE_S)
    told = [line for line in gate.lines if line.startswith(b"dropped")]
    assert sum(int(line.split()[1]) for line in told) == outlet.num_dropped > 0


def test_a_write_that_fails_costs_its_lines_and_no_later_ones() -> None:
    gate = Gate()
    gate.failures = 1
    gate.opened.set()
    outlet = Outlet(gate, notice)
    outlet.put(b"lost")
    deadline = time.monotonic() + DEADLINE_S
    while not outlet.num_dropped:
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)
    outlet.put(b"kept")
    outlet.close(DEADLINE_S)
    assert gate.lines == [b"dropped 1", b"kept"]


def test_a_full_file_becomes_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "made" / "rank.log"
    file = RotatingFile(path, max_bytes=100, num_files=3)
    for number in range(40):
        assert file.write(b"line %05d\n" % number) == 11
    kept = [path.with_name(name) for name in ("rank.log.2", "rank.log.1", "rank.log")]
    assert sorted(path.parent.iterdir()) == sorted(kept)
    assert all(part.stat().st_size <= 100 for part in kept)
    assert path.stat().st_mode & 0o077 == 0
    text = b"".join(part.read_bytes() for part in kept)
    numbers = [int(line.split()[1]) for line in text.splitlines()]
    assert numbers == list(range(numbers[0], 40))


def test_a_disk_that_was_full_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "rank.log"
    path.symlink_to("/dev/full")
    outlet = Outlet(RotatingFile(path, 1 << 20, 2), notice)
    outlet.put(b"lost")
    deadline = time.monotonic() + DEADLINE_S
    while not outlet.num_dropped:
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)
    path.unlink()
    outlet.put(b"kept")
    outlet.close(DEADLINE_S)
    assert path.read_bytes() == b"dropped 1\nkept\n"
