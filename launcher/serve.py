"""``baton serve``: from a configuration to one line ``ready http://HOST:PORT``, and to the end.

1. A private folder for sockets and configurations is made.
2. The coordinator starts and says where its control socket and its HTTP port are.
3. The ranks start, here or through Ray, and introduce themselves to the coordinator.
4. The coordinator says that every pool serves: we print the ready line.
5. Any child that ends, or a signal, ends everything: nothing of a cluster outlives it.
"""

import json
import logging
import queue
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from launcher.config import ServeConfig, child_environment, runtime_root
from launcher.processes import Exited, OutputLine, ProcessGroup, Report, StopAsked
from launcher.ranks import LocalRanks, RankStarter, coordinator_config
from launcher.resolved import Cluster, resolve_cluster
from protocol.errors import ConfigError

log = logging.getLogger(__name__)

COORDINATOR = "coordinator"
COORDINATOR_START_S = 60.0
FAREWELL_S = 3.0  # for the ranks to end because the coordinator says so


class ClusterFailed(Exception):
    """The cluster ended by itself. ``is_config``: because of how it was configured."""

    def __init__(self, reason: str, *, is_config: bool) -> None:
        super().__init__(reason)
        self.is_config = is_config


@contextmanager
def run_directory() -> Iterator[Path]:
    """A folder of mode 0700 that is gone afterwards."""
    # Unix socket paths end at 107 bytes, so the name is short.
    path = Path(tempfile.mkdtemp(prefix="baton-", dir=runtime_root()))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class Supervisor:
    """One running cluster. Use as a context manager; leaving it ends every process.

    Args:
        cluster: what to run.
        run_dir: a private folder for sockets and configuration files.
        log_dir: a folder for one log per process, or None for our standard error.
    """

    def __init__(self, cluster: Cluster, run_dir: Path, log_dir: Path | None = None) -> None:
        self.cluster = cluster
        self._run_dir = run_dir
        self._group = ProcessGroup(log_dir)
        self._ranks: RankStarter | None = None
        self.url = ""

    @property
    def reports(self) -> "queue.SimpleQueue[Report]":
        return self._group.reports

    def __enter__(self) -> "Supervisor":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start everything and wait until the cluster answers.

        Raises:
            ClusterFailed: a process ended, was refused, or the start took too long.
        """
        serve = self.cluster.serve
        config = coordinator_config(self.cluster, self._control_listen())
        file = self._run_dir / "coordinator.json"
        _write_private(file, config)
        environment = child_environment(1, is_local=serve.launcher == "local")
        self._group.start(COORDINATOR, "coordinator", file, environment)
        hello = self._wait_for("control", time.monotonic() + COORDINATOR_START_S)
        self.url = str(hello["http"])
        self._ranks = self._make_ranks()
        self._ranks.start(str(hello["control"]))
        self._wait_for("ready", time.monotonic() + serve.ready_timeout_s)

    def pids(self) -> dict[str, int]:
        """Process ids by name: ``coordinator``, ``prefill0/0``, ..."""
        return self._group.pids()

    def supervise(self) -> None:
        """Return when a signal asks to end.

        Raises:
            ClusterFailed: a process ended by itself.
        """
        while True:
            report = self.reports.get()
            if isinstance(report, StopAsked):
                log.info("%s: ending the cluster", report.signal_name)
                return
            self._check(report)

    def stop(self) -> None:
        """End every process: the coordinator first, it tells the ranks; then whoever is left."""
        self._group.terminate(COORDINATOR)
        self._group.wait_ended(FAREWELL_S)
        if self._ranks is not None:
            self._ranks.stop()
        self._group.stop()

    def _make_ranks(self) -> RankStarter:
        if self.cluster.serve.launcher == "ray":
            from launcher.ray_ranks import RayRanks

            return RayRanks(self.cluster, self.reports)
        return LocalRanks(self.cluster, self._run_dir, self._group)

    def _control_listen(self) -> str:
        if self.cluster.serve.launcher == "ray":
            from launcher.ray_ranks import head_address

            return f"tcp://{head_address(self.cluster.serve.ray_address)}:*"
        return f"ipc://{self._run_dir}/control.sock"

    def _wait_for(self, key: str, deadline: float) -> dict[str, object]:
        while True:
            try:
                report = self.reports.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise ClusterFailed(
                    f"the cluster was not {key} in time: raise ready_timeout_s, or read the log",
                    is_config=False,
                ) from None
            if isinstance(report, StopAsked):
                raise KeyboardInterrupt
            if isinstance(report, OutputLine) and report.name == COORDINATOR:
                said: dict[str, object] = json.loads(report.line)
                if "failed" in said:
                    raise ClusterFailed(str(said["failed"]), is_config=False)
                if key in said:
                    return said
            self._check(report)

    @staticmethod
    def _check(report: Report) -> None:
        if isinstance(report, Exited):
            reason = report.error or f"{report.name} ended with code {report.code}"
            raise ClusterFailed(reason, is_config=report.code == 2)


def _write_private(file: Path, content: bytes) -> None:
    file.touch(mode=0o600)
    file.write_bytes(content)


@contextmanager
def signals_to(reports: "queue.SimpleQueue[Report]") -> Iterator[None]:
    """SIGINT and SIGTERM become reports, so that one loop waits for everything."""

    def handler(number: int, _frame: FrameType | None) -> None:
        reports.put(StopAsked(signal.Signals(number).name))

    previous: dict[signal.Signals, Callable[..., object] | int | None] = {
        number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def serve(config: ServeConfig) -> int:
    """Run a cluster until a signal. Returns the exit code; messages go to standard error."""
    try:
        cluster = resolve_cluster(config)
    except ConfigError as error:
        return _fail(str(error), 2)
    log_dir = Path(config.log_dir).expanduser() if config.log_dir else None
    with (
        run_directory() as run_dir,
        Supervisor(cluster, run_dir, log_dir) as supervisor,
        signals_to(supervisor.reports),
    ):
        try:
            supervisor.start()
            if config.model is None:
                log.info("no MODEL given: this is the embedded one, see modeling/embedded")
            sys.stdout.write(f"ready {supervisor.url}\n")
            sys.stdout.flush()
            supervisor.supervise()
        except KeyboardInterrupt:
            return 0
        except ClusterFailed as error:
            return _fail(str(error), 2 if error.is_config else 1)
    return 0


def _fail(reason: str, code: int) -> int:
    sys.stderr.write(f"error: {reason}\n")
    return code
