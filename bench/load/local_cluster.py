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

from protocol.errors import ConfigError

START_S = 180.0
STOP_S = 25.0


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
        variables = [f"{name}={value}" for name, value in (environment or {}).items()]
        command = [sys.executable, "-P", "-m", "launcher", "serve", "--port", "0", *flags]
        with contextlib.ExitStack() as stack:
            stderr = None if log is None else stack.enter_context(log.open("a"))
            self.process = subprocess.Popen(
                ["env", *variables, *command], stdout=subprocess.PIPE, stderr=stderr, text=True
            )

    def wait_until_ready(self) -> str:
        """Block until it serves.

        Returns:
            Its URL, which is in ``url`` from now on, too.

        Raises:
            ConfigError: it did not become ready; the message says what it printed instead.
        """
        assert self.process.stdout is not None
        line = f"nothing in {START_S:.0f} s"
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if selector.select(START_S):
                line = self.process.stdout.readline().strip() or "it said nothing"
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
        if self.process.stdout is not None:
            self.process.stdout.close()
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
