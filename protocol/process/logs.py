"""One log format for every process: time, level, role and rank, then the message.

Nothing that a process says can hold it up or end it. Log records, and whatever is printed on
standard output and standard error, go through outlets (outlets.py), which drop what is not taken.
Records are limited by kind, which is the logger and the unformatted message: a caller who repeats a
mistake a thousand times fills no disk (line_rules.py).
"""

import atexit
import io
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO, cast

from protocol.process.line_rules import LineSplitter, RateLimit
from protocol.process.outlets import CLOSE_BUDGET_S, Descriptor, Outlet

LOG_LINES_DROPPED = "log_lines_dropped"  # in a heartbeat
MAX_RECORD_CHARS = 64 << 10  # with its traceback


class LogHandler(logging.Handler):
    """Puts records into an outlet, as far as their kind's limit allows.

    Args:
        outlet: takes them.
        limit: of each kind.
        clock: monotonic, in seconds.
    """

    def __init__(
        self, outlet: Outlet, limit: RateLimit, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._outlet = outlet
        self._limit = limit
        self._clock = clock
        outlet.tick = self.settle

    @property
    def num_dropped(self) -> int:
        return self._limit.num_dropped + self._outlet.num_dropped

    def emit(self, record: logging.LogRecord) -> None:
        try:
            kind = f"{record.name}: {str(record.msg)[:200]}"
            num_before = self._limit.admit(kind, self._clock())
            if num_before is None:
                return
            if num_before:
                self._log_dropped(record.levelname, kind, num_before)
            text = self.format(record)
            if len(text) > MAX_RECORD_CHARS:
                text = f"{text[:MAX_RECORD_CHARS]} ... and {len(text) - MAX_RECORD_CHARS} more"
            self._outlet.put(text.encode("utf-8", "replace"))
        except Exception:  # noqa: BLE001 - logging reports a record that cannot be formatted
            self.handleError(record)

    def settle(self) -> None:
        """Log how many records were dropped of the kinds that have become quiet."""
        self.acquire()
        try:
            for kind, num_dropped in self._limit.settle(self._clock()):
                self._log_dropped("WARNING", kind, num_dropped)
        finally:
            self.release()

    def _log_dropped(self, level: str, kind: str, num_dropped: int) -> None:
        number = logging.getLevelNamesMapping().get(level, logging.WARNING)
        text = f"{num_dropped} more like this were dropped: {kind}"
        record = logging.LogRecord(__name__, number, __file__, 0, text, None, None)
        self._outlet.put(self.format(record).encode("utf-8", "replace"))


class LineStream(io.TextIOBase):
    """Stands in for ``sys.stdout`` or ``sys.stderr``: whole lines go into an outlet.

    ``flush`` does not wait: nothing that prints may. :func:`finish_output` does.
    """

    def __init__(self, outlet: Outlet, number: int) -> None:
        self._outlet = outlet
        self._number = number
        self._splitter = LineSplitter(4 * MAX_RECORD_CHARS)
        self._lock = threading.RLock()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute in the base class
        return "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "replace"

    def write(self, text: str) -> int:
        with self._lock:
            for line in self._splitter.feed(text.encode("utf-8", "replace")):
                self._outlet.put(line)
        return len(text)

    def finish(self, budget_s: float) -> None:
        """Take no more text, and wait up to ``budget_s`` until the rest is written."""
        with self._lock:
            for line in self._splitter.end():
                self._outlet.put(line)
        self._outlet.close(budget_s)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)


def configure_logging(who: str, level: str = "INFO") -> None:
    """Send this process's log to standard error.

    From now on printing never waits for a reader; see :func:`finish_output` for the end.

    Args:
        who: the name of this process, such as ``prefill0/1``, which marks each line.
        level: of the records that are kept.
    """
    _hold_standard_streams()
    form = f"%(asctime)s.%(msecs)03d %(levelname).1s {who} %(message)s"
    formatter = logging.Formatter(form, "%H:%M:%S")

    def notice(num_lines: int) -> bytes:
        text = f"{num_lines} lines were dropped here: nobody read them, or the disk was full"
        record = logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, None, None)
        return formatter.format(record).encode()

    finish_output()  # of an earlier configuration
    errors = Outlet(Descriptor(2), notice)
    handler = LogHandler(errors, RateLimit())
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    sys.stderr = cast(TextIO, LineStream(errors, 2))
    sys.stdout = cast(TextIO, LineStream(Outlet(Descriptor(1)), 1))
    atexit.register(finish_output)


def finish_output(budget_s: float = CLOSE_BUDGET_S) -> None:
    """Wait up to ``budget_s`` until all output is written; call it before ``os._exit``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, LineStream):
            stream.finish(budget_s)


def num_dropped_lines() -> int:
    """The number of log lines of this process that were dropped."""
    handlers = logging.getLogger().handlers
    return sum(handler.num_dropped for handler in handlers if isinstance(handler, LogHandler))


def _hold_standard_streams() -> None:
    """Open /dev/null in place of a closed standard stream.

    Otherwise the next socket would get its number, and all that is printed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
