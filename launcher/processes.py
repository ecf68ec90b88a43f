"""Local processes: started, watched, and never left behind.

1. ``start`` runs ``python -P -m MODULE --config FILE`` with an environment that is complete before
   the interpreter starts. ``-P`` keeps the current folder from shadowing our packages.
2. One thread per child reads its output until the end, then reports its exit. Every report goes to
   one queue, so the supervisor waits in one place.
3. ``stop`` asks with SIGTERM, waits out a budget, then kills. Children also ask the kernel to kill
   them when their parent dies, so a killed launcher leaves nothing either.
"""

import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

STOP_BUDGET_S = 8.0


@dataclass(frozen=True, slots=True)
class OutputLine:
    """A child wrote a line on its standard output."""

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


class Child:
    """One process and the threads that read it.

    Args:
        name: how it is called in messages, ``prefill0/1``.
        argv: the command.
        environment: the whole of its environment.
        log: where its standard error goes: a file to append to, or None for ours.
        reports: where its lines and its exit are told.
        start: which start of its gang this is.
    """

    def __init__(
        self,
        name: str,
        argv: list[str],
        environment: Mapping[str, str],
        log: Path | None,
        reports: "queue.SimpleQueue[Report]",
        start: int,
    ) -> None:
        self.name = name
        self._start = start
        self._log = log
        self._reports = reports
        self._error: str | None = None
        self.process = subprocess.Popen(
            argv,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
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

    def _read_output(self, stream: IO[str]) -> None:
        for line in stream:
            self._reports.put(OutputLine(self.name, line.rstrip("\n")))

    def _read_errors(self, stream: IO[str]) -> None:
        if self._log is None:
            for line in stream:
                if line.startswith("error: "):
                    self._error = line.removeprefix("error: ").rstrip("\n")
                else:
                    sys.stderr.write(line)
            return
        with self._log.open("a", encoding="utf-8") as log:
            for line in stream:
                if line.startswith("error: "):
                    self._error = line.removeprefix("error: ").rstrip("\n")
                log.write(line)
                log.flush()

    def _wait(self) -> None:
        for thread in self._threads:
            thread.join()
        self._reports.put(Exited(self.name, self.process.wait(), self._error, self._start))


class ProcessGroup:
    """The children of one launcher."""

    def __init__(self, log_dir: Path | None = None) -> None:
        self.reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._log_dir = log_dir
        self._children: dict[str, Child] = {}
        if log_dir is not None:
            log_dir.mkdir(parents=True, exist_ok=True)

    def start(
        self,
        name: str,
        module: str,
        config_file: Path,
        environment: Mapping[str, str],
        start: int = 1,
    ) -> None:
        """Start ``python -P -m module --config config_file``; again, if it has ended before."""
        argv = [sys.executable, "-P", "-m", module, "--config", str(config_file)]
        log = self._log_dir / f"{name.replace('/', '.')}.log" if self._log_dir else None
        self._children[name] = Child(name, argv, environment, log, self.reports, start)

    def pids(self) -> dict[str, int]:
        """Process ids by name, of those that still run."""
        return {
            name: child.process.pid
            for name, child in self._children.items()
            if child.process.poll() is None
        }

    def terminate(self, name: str) -> None:
        """Ask one child to end. Does not wait."""
        child = self._children.get(name)
        if child is not None and child.process.poll() is None:
            child.process.terminate()

    def kill(self, name: str) -> None:
        """End one child, whatever it is doing; one that is stopped too. Does not wait."""
        child = self._children.get(name)
        if child is not None and child.process.poll() is None:
            child.process.kill()

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
        running = [child for child in self._children.values() if child.process.poll() is None]
        for child in running:
            child.process.terminate()
        deadline = time.monotonic() + budget_s
        for child in running:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
        for child in running:
            child.process.wait()
