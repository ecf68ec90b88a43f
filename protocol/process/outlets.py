"""Lines on their way out of a process, to a stream without a reader or a disk that may be full.

1. ``Outlet.put`` never waits and never raises. Lines wait in memory, up to a number of bytes;
   beyond that the oldest are dropped and counted.
2. One daemon thread writes them. A stream that is not read holds up that thread alone.
3. A write that fails costs the lines in hand; later ones are tried again, after a pause. A notice
   of the number of dropped lines is written as soon as the stream takes lines again.
4. ``close`` waits for the rest up to a budget, because a process that ends must end.
"""

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

MAX_WAITING_BYTES = 1 << 20
BATCH_BYTES = 64 << 10
RETRY_S = 1.0
TICK_S = 1.0
CLOSE_BUDGET_S = 1.0
_POLL_S = 0.1


class Sink(Protocol):
    """The destination of an outlet's lines. For one thread."""

    def write(self, data: bytes) -> int:
        """Write some of ``data``, perhaps nothing, in a fraction of a second.

        Returns:
            The number of bytes.

        Raises:
            OSError: it cannot be written now.
        """
        ...


class Descriptor:
    """A stream that was open before us; it stays open.

    A pipe that is ready takes PIPE_BUF bytes without waiting. A non-blocking pipe would be surer,
    but it would be non-blocking for every other process that has it open, too.
    """

    def __init__(self, number: int) -> None:
        self._number = number

    def write(self, data: bytes) -> int:
        if not select.select([], [self._number], [], _POLL_S)[1]:
            return 0
        return os.write(self._number, data[: select.PIPE_BUF])


class RotatingFile:
    """A file that is renamed ``FILE.1`` when it is full, ``FILE.1`` becomes ``FILE.2``, and so on.

    Args:
        path: opened with the first line, and again after an error.
        max_bytes: of one file, but for the last line.
        num_files: that there are at most, the current one included.
    """

    def __init__(self, path: Path, max_bytes: int, num_files: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._num_files = num_files
        self._file: int | None = None
        self._size = 0
        self._is_at_start = True  # of a line

    def write(self, data: bytes) -> int:
        try:
            if self._size and self._is_at_start and self._size + len(data) > self._max_bytes:
                self._rotate()
            if self._file is None:
                self._open()
            assert self._file is not None
            written = os.write(self._file, data)
        except OSError:
            self._close()
            raise
        self._size += written
        self._is_at_start = data[:written].endswith(b"\n")
        return written

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = os.open(self._path, flags, 0o600)
        self._size = os.fstat(self._file).st_size
        self._is_at_start = True

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
        self._file = None
        self._size = 0

    def _rotate(self) -> None:
        self._close()
        name = self._path.name
        older = [self._path.with_name(f"{name}.{n}") for n in range(1, self._num_files)]
        if not older:
            self._path.unlink(missing_ok=True)
        newer = [self._path, *older]
        for number in reversed(range(len(older))):
            with contextlib.suppress(FileNotFoundError):
                newer[number].replace(older[number])


class Outlet:
    """Lines to one sink, from any thread.

    Args:
        sink: writes them.
        notice: makes the line that reports the number of dropped lines; None: no report.
        max_waiting_bytes: of lines in memory.
    """

    def __init__(
        self,
        sink: Sink,
        notice: Callable[[int], bytes] | None = None,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
    ) -> None:
        self.num_dropped = 0
        self.tick: Callable[[], None] | None = None  # called by the thread, once in a while
        self._sink = sink
        self._notice = notice
        self._max_waiting_bytes = max_waiting_bytes
        self._num_untold = 0
        self._changed = threading.Condition()  # its lock is reentrant: a signal's handler may log
        self._waiting: deque[bytes] = deque()
        self._num_bytes = 0
        self._deadline: float | None = None  # of closing
        self._is_mid_line = False
        self._thread: threading.Thread | None = None

    def put(self, line: bytes) -> None:
        """Write a line, given without its end. Does not wait."""
        with self._changed:
            if self._deadline is not None:
                self.num_dropped += 1
                return
            self._waiting.append(line)
            self._num_bytes += len(line) + 1
            while self._num_bytes > self._max_waiting_bytes:
                self._num_bytes -= len(self._waiting.popleft()) + 1
                self._count_dropped(1)
            if self._thread is None or not self._thread.is_alive():  # nor is it in a forked child
                self._thread = threading.Thread(target=self._run, name="outlet", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self, budget_s: float = CLOSE_BUDGET_S) -> None:
        """Take no more lines, and wait up to ``budget_s`` until the rest is written. Idempotent."""
        with self._changed:
            if self._deadline is None:
                self._deadline = time.monotonic() + budget_s
            thread = self._thread
            self._changed.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join(budget_s)

    def _count_dropped(self, num_lines: int) -> None:
        self.num_dropped += num_lines
        self._num_untold += num_lines

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._write_batch():
            if self.tick is not None:
                self.tick()

    def _write_batch(self) -> bool:
        """Write the lines that wait, or wait a while for some; whether to go on."""
        with self._changed:
            if not self._waiting and self._deadline is None:
                self._changed.wait(TICK_S)
            lines = self._take()
            if not lines:
                return self._deadline is None
            untold = self._num_untold
            self._num_untold = 0
        if untold and self._notice is not None:
            lines.insert(0, self._notice(untold))
        if not self._write(b"".join(line + b"\n" for line in lines)):
            with self._changed:
                self._count_dropped(len(lines) - (1 if untold and self._notice else 0))
                self._num_untold += untold
                self._changed.wait_for(lambda: self._deadline is not None, RETRY_S)
        return True

    def _take(self) -> list[bytes]:
        lines: list[bytes] = []
        size = 0
        while self._waiting and (not lines or size + len(self._waiting[0]) < BATCH_BYTES):
            lines.append(self._waiting.popleft())
            size += len(lines[-1]) + 1
        self._num_bytes -= size
        return lines

    def _write(self, data: bytes) -> bool:
        if self._is_mid_line:
            data = b"\n" + data
        try:
            while data:
                written = self._sink.write(data)
                if written:
                    self._is_mid_line = not data[:written].endswith(b"\n")
                data = data[written:]
                if data and self._deadline is not None and time.monotonic() > self._deadline:
                    return False
        except (OSError, ValueError):  # select refuses the number of a stream that was closed
            return False
        return True
