"""A cluster of our own, started as an operator would start it: the one home of this.

``baton serve`` is started as a child on a free port. This layer knows its command line, the line
that it prints when it is ready, and that its processes are named after their configuration files.
"""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from protocol.errors import ConfigError

START_S = 180.0
STOP_S = 25.0


class ServeProcess(Protocol):
    """What is used of a ``subprocess.Popen``."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: int, /) -> None: ...

    def kill(self) -> None: ...


class LocalCluster:
    """A ``baton serve`` process, begun when this is made; ``local_cluster`` is the usual way.

    Args:
        flags: of ``baton serve``, the model first if one is named.
        log: a file that gets what the cluster says; without one it goes to our standard error.
        environment: variables of the cluster beside our own.
    """

    def __init__(
        self,
        flags: Sequence[str],
        *,
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.url = ""
        self._flags = flags
        self._log = log
        argv = ("launcher", "serve", "--port", "0", *flags)
        self.process: ServeProcess
        with contextlib.ExitStack() as stack:
            stderr = None if log is None else stack.enter_context(log.open("a"))
            self.process, self._output = self._start(argv, environment or {}, stderr)

    def _start(
        self, argv: Sequence[str], environment: Mapping[str, str], stderr: IO[str] | None
    ) -> tuple[ServeProcess, IO[str]]:
        """Start ``python -P -m argv``: the process, and what it prints."""
        variables = [f"{name}={value}" for name, value in environment.items()]
        command = ["env", *variables, sys.executable, "-P", "-m", *argv]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert process.stdout is not None
        return process, process.stdout

    def wait_until_ready(self) -> str:
        """Block until it serves.

        Returns:
            Its URL, which is in ``url`` from now on, too.

        Raises:
            ConfigError: it did not become ready; the message says what it printed instead.
        """
        line = f"nothing in {START_S:.0f} s"
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            if selector.select(START_S):
                line = self._output.readline().strip() or "it said nothing"
        if not line.startswith("ready http"):
            where = f"; see {self._log}" if self._log is not None else ""
            raise ConfigError(f"baton serve {' '.join(self._flags)} did not start: {line}{where}")
        self.url = line.split()[1]
        return self.url

    def processes(self) -> dict[str, int]:
        """Process ids by name: ``coordinator``, ``prefill0/0``, ``decode0/1``, ...

        They are looked up each time: a gang that was restarted has other processes.
        """
        found = {}
        for pid in descendants(self.process.pid):
            arguments = _text(Path(f"/proc/{pid}/cmdline")).split("\0")[:-1]
            if "--config" in arguments[:-1]:
                file = Path(arguments[arguments.index("--config") + 1])
                found[file.stem.replace(".", "/")] = pid
        return found

    def stop(self) -> int:
        """Have it end its ranks and itself. Idempotent.

        Returns:
            The exit code; below zero when it had to be killed, and its ranks end by themselves.
        """
        if self.process.poll() is None:
            for pid in descendants(self.process.pid):  # a stopped process cannot end
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            self.process.send_signal(signal.SIGINT)
        try:
            code = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._output.close()
        return code


@contextlib.contextmanager
def local_cluster(
    flags: Sequence[str],
    log: Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
) -> Iterator[LocalCluster]:
    """A cluster that serves while the block runs, and ends with it.

    Raises:
        ConfigError: it did not become ready.
    """
    cluster = LocalCluster(flags, log=log, environment=environment)
    try:
        cluster.wait_until_ready()
        yield cluster
    finally:
        cluster.stop()


def descendants(pid: int) -> list[int]:
    """Process ids of all children of a process, and of theirs."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in _text(Path(f"/proc/{pid}/task/{task}/children")).split():
                found += [int(child), *descendants(int(child))]
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
