"""Local processes: started, watched, and never left behind.

1. ``start`` runs ``python -P -m MODULE --config FILE`` with an environment that is complete before
   the interpreter starts. ``-P`` keeps the current folder from shadowing our packages. A module
   that a fork server (forks.py) has imported runs as a fork of it, which only takes less time.
2. Threads read a child's output until the end, even if the log cannot be written, then report its
   exit. Every report goes to one queue, so the supervisor waits in one place.
3. ``stop`` asks by a signal, waits out a budget, then kills. Children also ask the kernel to kill
   them when their parent dies, so a killed launcher leaves nothing either.
"""

import contextlib
import json
import logging
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from launcher.supervise.forks import ForkedProcess, ForkServer, ForkServerGone, start_piped
from protocol.process.ending import DRAIN, END
from protocol.process.line_rules import LineSplitter
from protocol.process.outlets import Outlet, RotatingFile

log = logging.getLogger(__name__)

FORK_SERVER = "fork-server"  # among the names of children
STOP_BUDGET_S = 8.0
OUTPUT_BUDGET_S = 1.0  # for the last children's output to be written
READ_BYTES = 64 << 10
_ERROR = "error: "


@dataclass(frozen=True, slots=True)
class OutputLine:
    """A child wrote a JSON object on a line of its standard output; the rest of that is log."""

    name: str
    line: str


@dataclass(frozen=True, slots=True)
class Exited:
    """A child is gone. ``error`` is its last ``error: ...`` line, if it wrote one."""

    name: str
    code: int
    error: str | None
    start: int = 1  # which start of its gang it was of

    @property
    def reason(self) -> str:
        return self.error or f"{self.name} ended with code {self.code}"


@dataclass(frozen=True, slots=True)
class StartFailed:
    """Not every process of a gang could be started, and none of them is left."""

    name: str  # of the gang
    start: int
    reason: str


@dataclass(frozen=True, slots=True)
class StopAsked:
    """A signal asks us to end."""

    signal_name: str


Report = OutputLine | Exited | StartFailed | StopAsked


@dataclass(frozen=True, slots=True)
class LogFiles:
    """Where the standard error of each process goes, if not to ours."""

    folder: Path
    max_bytes: int = 64 << 20  # of one file
    num_files: int = 5  # of one process, the current one included

    def open(self, name: str) -> Outlet:
        """The file of the process ``name``; it is made with the first line."""
        path = self.folder / f"{name.replace('/', '.')}.log"
        return Outlet(RotatingFile(path, self.max_bytes, self.num_files), _dropped)


def _dropped(num_lines: int) -> bytes:
    return b"%d lines were dropped here: the disk was full, or failed" % num_lines


Process = subprocess.Popen[bytes] | ForkedProcess


class Child:
    """One process and the threads that read it.

    Args:
        name: in messages, such as ``prefill0/1``.
        process: it, with pipes for its outputs.
        log: takes the lines of its standard error; None writes them to ours.
        reports: gets its lines and its exit.
        start: which start of its gang this is.
    """

    def __init__(
        self,
        name: str,
        process: Process,
        log: Outlet | None,
        reports: "queue.SimpleQueue[Report]",
        start: int,
    ) -> None:
        self.name = name
        self._start = start
        self._log = log
        self._reports = reports
        self._error: str | None = None
        self.process = process
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._threads = [
            threading.Thread(target=self._read_output, args=(self.process.stdout,), daemon=True),
            threading.Thread(target=self._read_errors, args=(self.process.stderr,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        self._waiter = threading.Thread(target=self._wait, daemon=True)
        self._waiter.start()

    def _read_output(self, stream: IO[bytes]) -> None:
        for line in _lines(stream):
            if _is_object(line):
                self._reports.put(OutputLine(self.name, line))
            else:  # of a library
                self._write(line)

    def _read_errors(self, stream: IO[bytes]) -> None:
        for line in _lines(stream):
            if line.startswith(_ERROR):
                self._error = line.removeprefix(_ERROR)
                if self._log is None:
                    continue  # the launcher prints the reason of the exit itself
            self._write(line)

    def _write(self, line: str) -> None:
        if self._log is None:
            with contextlib.suppress(OSError, ValueError):  # the thread must go on reading
                sys.stderr.write(f"{line}\n")
        else:
            self._log.put(line.encode("utf-8", "replace"))

    def wait_read(self, timeout_s: float) -> None:
        """Wait until everything that it has written was read."""
        self._waiter.join(max(0.0, timeout_s))

    def _wait(self) -> None:
        for thread in self._threads:
            thread.join()
        self._reports.put(Exited(self.name, self.process.wait(), self._error, self._start))


def _lines(stream: IO[bytes]) -> Iterator[str]:
    """Every line until the end; lines that are too long are cut."""
    splitter = LineSplitter()
    with stream:
        while piece := stream.read(READ_BYTES):
            for line in splitter.feed(piece):
                yield line.decode("utf-8", "replace")
    for line in splitter.end():
        yield line.decode("utf-8", "replace")


def _is_object(line: str) -> bool:
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


class ProcessGroup:
    """The children of one launcher.

    Args:
        log_files: for their standard errors; None writes them to ours.
    """

    def __init__(self, log_files: LogFiles | None = None) -> None:
        self.reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._log_files = log_files
        self._logs: dict[str, Outlet] = {}  # by name: of all starts of a process
        self._children: dict[str, Child] = {}
        self._forks: ForkServer | None = None

    def start_fork_server(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        """Import ``modules`` once; processes with this environment are forks from now on.

        Before the first of them, wait for FORK_SERVER to report ``{"preloaded": USABLE}``; when it
        is of no use, or exits, call :meth:`end_fork_server`.
        """
        self._forks = ForkServer(modules, environment)
        self._add(FORK_SERVER, self._forks.start, 1)

    def end_fork_server(self, reason: str = "") -> None:
        """Fork no more: each process imports for itself. A ``reason`` is logged. Idempotent."""
        if self._forks is None:
            return
        if reason:
            log.warning("ranks are not forked from now on, each imports for itself: %s", reason)
        self._forks.close()
        self._forks = None
        self.kill(FORK_SERVER)

    def start(
        self,
        name: str,
        module: str,
        config_file: Path,
        environment: Mapping[str, str],
        start: int = 1,
    ) -> None:
        """Start ``python -P -m module --config config_file``; again, if it has ended before.

        A process that cannot be started is reported as one that has exited.
        """
        argv = (module, "--config", str(config_file))
        forks = self._forks
        if forks is not None and forks.environment == environment:
            try:
                self._add(name, lambda: forks.fork(*argv), start)
                return
            except ForkServerGone as error:
                self.end_fork_server(f"the fork server {error}")
        command = (sys.executable, "-P", "-m", *argv)
        self._add(name, lambda: start_piped(command, environment), start)

    def _add(self, name: str, start_process: Callable[[], Process], start: int) -> None:
        if self._log_files is not None and name not in self._logs:
            self._logs[name] = self._log_files.open(name)
        log = self._logs.get(name)
        try:
            process = start_process()
        except OSError as error:  # no memory, no descriptors: perhaps for now
            self.reports.put(Exited(name, 1, f"{name} cannot be started: {error}", start))
        else:
            self._children[name] = Child(name, process, log, self.reports, start)

    def pids(self) -> dict[str, int]:
        """Process ids by name, of those that still run."""
        return {
            name: child.process.pid
            for name, child in self._children.items()
            if child.process.poll() is None
        }

    def terminate(self, name: str) -> None:
        """Ask one child to end. Does not wait."""
        self._send(name, END)

    def drain(self, name: str) -> None:
        """Ask one child to end when nothing runs in it any more. Does not wait."""
        self._send(name, DRAIN)

    def kill(self, name: str) -> None:
        """End one child, whatever it is doing; one that is stopped too. Does not wait."""
        self._send(name, signal.SIGKILL)

    def _send(self, name: str, number: signal.Signals) -> None:
        child = self._children.get(name)
        if child is not None:
            child.process.send_signal(number)  # nothing if it has ended

    def wait_ended(self, budget_s: float) -> None:
        """Give every child that long to end by itself."""
        deadline = time.monotonic() + budget_s
        for child in self._children.values():
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return

    def stop(self, budget_s: float = STOP_BUDGET_S) -> None:
        """Ask every child to end, and kill those that have not after ``budget_s``."""
        self.end_fork_server()
        running = [child for child in self._children.values() if child.process.poll() is None]
        for child in running:
            child.process.send_signal(END)
        deadline = time.monotonic() + budget_s
        for child in running:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
        for child in running:
            child.process.wait()
        deadline = time.monotonic() + OUTPUT_BUDGET_S
        for child in self._children.values():
            child.wait_read(deadline - time.monotonic())
        for log in self._logs.values():
            log.close(max(0.0, deadline - time.monotonic()))
