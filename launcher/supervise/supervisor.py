"""One running cluster: its processes, from the first to the last.

1. ``start``: the coordinator, and beside it the fork server, which imports what ranks need; then
   every gang. Any failure before all of them serve ends the cluster.
2. ``supervise``: reports of the processes go to the rules (gangs.py, pure), whose actions end, kill
   and start gangs. The coordinator is started again on the addresses that it had, with the list of
   pools to wait for.
3. Asked to end, ``supervise`` has the coordinator drain first: nothing is started again any more,
   but a process that hangs is still killed. Asked twice, it returns at once.
4. ``stop`` ends the coordinator first, which ends the ranks; then all that is left.

The end of a rank shows in its process's exit, or is reported by the coordinator, which finds ranks
that are stopped or hang. The end of the coordinator shows in its exit or its silence. A gang's
start number, which is in every HELLO and in every line about a gang, tells its starts apart.
"""

import json
import logging
import queue
import time
from pathlib import Path
from typing import Any

import msgspec

from coordinator.http.start_report import StartReport
from launcher.config import coordinator_environment
from launcher.resolved import Cluster
from launcher.supervise.gangs import (
    COORDINATOR,
    Action,
    End,
    Fail,
    Gangs,
    Kill,
    Look,
    RestartTimeouts,
    Say,
    Start,
)
from launcher.supervise.processes import (
    FORK_SERVER,
    Exited,
    LogFiles,
    OutputLine,
    ProcessGroup,
    Report,
    StartFailed,
    StopAsked,
)
from launcher.supervise.ranks import LocalRanks, RankStarter, coordinator_config, write_config
from launcher.supervise.restarts import RestartPolicy
from launcher.supervise.vitals import read_vitals
from protocol.errors import ConfigError

log = logging.getLogger(__name__)

COORDINATOR_START_S = 60.0
_PRELOADED = "preloaded"  # of the fork server's line
FAREWELL_S = 3.0  # for the ranks to end after the coordinator's Shutdown
EXIT_WAIT_S = 3.0  # for the exit of a process that the coordinator has lost already


class ClusterFailed(Exception):
    """The cluster ended by itself. ``is_config``: because of how it was configured."""

    def __init__(self, reason: str, *, is_config: bool) -> None:
        super().__init__(reason)
        self.is_config = is_config


class Supervisor:
    """One running cluster. Use as a context manager; leaving it ends every process.

    Args:
        cluster: what to run.
        run_dir: a private folder for sockets and configuration files.
        log_files: for one log per process, or None for our standard error.
    """

    def __init__(self, cluster: Cluster, run_dir: Path, log_files: LogFiles | None = None) -> None:
        self.cluster = cluster
        self.url = ""
        serve = cluster.serve
        self._run_dir = run_dir
        self._group = ProcessGroup(log_files)
        self._ranks = self._make_ranks()
        self._control_address = ""
        self.report: StartReport | None = None  # once the cluster has come up
        self._epoch = 1  # the coordinator's
        self._gangs: Gangs | None = None  # once the cluster has come up
        self._pools = {pool.pool_id: pool for pool in cluster.pools}
        self._said: dict[str, object] = {}  # by coordinator and fork server, while it comes up
        self._policy = RestartPolicy(
            serve.restart_budget, serve.restart_window_s, serve.restart_backoff_s
        )

    @property
    def reports(self) -> "queue.SimpleQueue[Report]":
        return self._group.reports

    def __enter__(self) -> "Supervisor":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- the start ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Start everything and wait until the cluster answers.

        Raises:
            ClusterFailed: a process ended, was refused, or the start took too long.
        """
        serve = self.cluster.serve
        has_fork_server = self._ranks.prepare()
        self._start_coordinator({"control_listen": self._control_listen(), "epoch": self._epoch})
        hello = self._wait_for("control", time.monotonic() + COORDINATOR_START_S)
        self.url = str(hello["http"])
        self._control_address = str(hello["control"])
        if has_fork_server:
            self._wait_for(_PRELOADED, time.monotonic() + serve.ready_timeout_s)
        for pool in self.cluster.pools:
            self._ranks.start(pool, 1, self._control_address)
        said = self._wait_for("ready", time.monotonic() + serve.ready_timeout_s)
        self.report = msgspec.json.decode(str(said["report"]), type=StartReport)
        waits = RestartTimeouts(
            start_s=serve.ready_timeout_s,
            coordinator_start_s=COORDINATOR_START_S,
            coordinator_silent_s=serve.coordinator_silence_s,
            coordinator_stall_s=serve.coordinator_stall_s,
        )
        pools = [(pool.pool_id, pool.role, pool.num_ranks) for pool in self.cluster.pools]
        self._gangs = Gangs(pools, self._policy, waits, time.monotonic())

    def _start_coordinator(self, where: dict[str, Any]) -> None:
        config = coordinator_config(self.cluster, where)
        file = self._run_dir / "coordinator.json"
        write_config(file, config)
        is_local = self.cluster.serve.launcher == "local"
        environment = coordinator_environment(is_local=is_local)
        self._group.start(COORDINATOR, "coordinator", file, environment, int(where["epoch"]))

    def _make_ranks(self) -> RankStarter:
        if self.cluster.serve.launcher == "ray":
            from launcher.supervise.ray_ranks import RayRanks

            return RayRanks(self.cluster, self.reports)
        return LocalRanks(self.cluster, self._run_dir, self._group)

    def _control_listen(self) -> str:
        if self.cluster.serve.launcher == "ray":
            from launcher.supervise.ray_ranks import head_address

            return f"tcp://{head_address(self.cluster.serve)}:*"
        return f"ipc://{self._run_dir}/control.sock"

    def _wait_for(self, key: str, deadline: float) -> dict[str, object]:
        late = f"the cluster was not {key} in time: raise ready_timeout_s, or read the log"
        while key not in self._said:
            try:
                report = self.reports.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise ClusterFailed(late, is_config=False) from None
            if isinstance(report, StopAsked):
                raise KeyboardInterrupt
            if isinstance(report, OutputLine) and report.name == COORDINATOR:
                said: dict[str, object] = json.loads(report.line)
                if "failed" in said:
                    raise ClusterFailed(str(said["failed"]), is_config=False)
                if "lost" in said:  # its own exit, which may follow, has a better reason
                    late = f"{said['lost']} is lost: {said['reason']}"
                    deadline = min(deadline, time.monotonic() + EXIT_WAIT_S)
                self._said |= said
            if self._is_of_fork_server(report):
                continue
            if isinstance(report, StartFailed):
                raise ClusterFailed(report.reason, is_config=True)
            if isinstance(report, Exited):
                raise ClusterFailed(report.reason, is_config=report.code == 2)
        return self._said

    def _is_of_fork_server(self, report: Report) -> bool:
        """Handle a report of the fork server; False, and nothing is done, for any other."""
        if not isinstance(report, OutputLine | Exited) or report.name != FORK_SERVER:
            return False
        if isinstance(report, Exited):
            self._said[_PRELOADED] = False
            self._group.end_fork_server(report.reason)
        else:
            self._said |= json.loads(report.line)
            if not self._said[_PRELOADED]:
                self._group.end_fork_server("a library has started threads in the fork server")
        return True

    # -- while it runs -----------------------------------------------------------------------------

    def supervise(self) -> None:
        """Return when the cluster is asked to end.

        Raises:
            ClusterFailed: nothing can be served any more.
        """
        gangs = self._gangs
        assert gangs is not None, "start() comes first"
        while True:
            try:
                report = self.reports.get(timeout=gangs.wait_s(time.monotonic()))
            except queue.Empty:
                self._do(gangs, gangs.tick(time.monotonic()))
                continue
            if isinstance(report, StopAsked):
                self._drain(gangs, report.signal_name)
                return
            if self._is_farewell(report):
                return
            self._do(gangs, self._judge(gangs, report, time.monotonic()))
            if self.reports.empty():
                self._do(gangs, gangs.tick(time.monotonic()))

    def _drain(self, gangs: Gangs, reason: str) -> None:
        """Let running requests end, until the coordinator has ended, or a second signal comes."""
        grace_s = self.cluster.serve.shutdown_grace_s
        log.info("%s: ending the cluster, what runs has %.0f s", reason, grace_s)
        gangs.close()
        self._group.drain(COORDINATOR)
        deadline = time.monotonic() + grace_s + FAREWELL_S
        while COORDINATOR in self._group.pids() and (now := time.monotonic()) < deadline:
            try:
                report = self.reports.get(timeout=min(gangs.wait_s(now), deadline - now))
            except queue.Empty:
                self._do(gangs, gangs.tick(time.monotonic()))
                continue
            if isinstance(report, StopAsked):
                log.info("%s: ending the cluster at once", report.signal_name)
                return
            if not (isinstance(report, Exited) and report.code == 0):  # that is in order now
                self._do(gangs, self._judge(gangs, report, time.monotonic()))

    @staticmethod
    def _is_farewell(report: Report) -> bool:
        # A coordinator that ends in order was asked to, and has sent Shutdown to every rank.
        return isinstance(report, Exited) and (report.name, report.code) == (COORDINATOR, 0)

    def _judge(self, gangs: Gangs, report: Report, now: float) -> list[Action]:
        if self._is_of_fork_server(report):
            return []
        if isinstance(report, Exited):
            name, _, rank = report.name.partition("/")
            return gangs.on_exit(name, int(rank or 0), report.start, report.reason, now)
        if isinstance(report, StartFailed):
            return gangs.on_start_failed(report.name, report.start, report.reason, now)
        if isinstance(report, OutputLine) and report.name == COORDINATOR:
            return self._on_line(gangs, json.loads(report.line), now)
        return []

    def _on_line(self, gangs: Gangs, said: dict[str, Any], now: float) -> list[Action]:
        if "alive" in said:
            gangs.on_alive(said["alive"], now)
        elif "lost" in said:
            return gangs.on_lost(said["lost"], said["start"], said["reason"], now)
        elif "serving" in said:
            return gangs.on_serving(said["serving"], said["start"], now)
        elif "control" in said:
            return gangs.on_serving(COORDINATOR, self._epoch, now)
        return []

    def _do(self, gangs: Gangs, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Say():
                    log.warning("%s", action.text)
                case Fail():
                    raise ClusterFailed(action.reason, is_config=False)
                case Start():
                    self._start_again(gangs, action)
                case Look():
                    self._look(gangs, action)
                case End() | Kill() if action.name == COORDINATOR:
                    self._group.kill(COORDINATOR)
                case End():
                    self._ranks.terminate(self._pools[action.name])
                case Kill():
                    self._ranks.kill(self._pools[action.name])

    def _look(self, gangs: Gangs, action: Look) -> None:
        pid = self._group.pids().get(action.name)
        vitals = None if pid is None else read_vitals(pid)
        self._do(gangs, gangs.on_vitals(action.start, vitals, time.monotonic()))

    def _start_again(self, gangs: Gangs, action: Start) -> None:
        if action.name == COORDINATOR:
            self._epoch = action.start
            where = {
                "control_listen": self._control_address,
                "port": int(self.url.rpartition(":")[2]),
                "epoch": action.start,
                "is_restart": True,
                "rejoining": gangs.serving_pools,
            }
            try:
                self._start_coordinator(where)
            except ConfigError as error:
                self.reports.put(Exited(COORDINATOR, 1, str(error), action.start))
            return
        pool = self._pools[action.name]
        try:
            self._ranks.start(pool, action.start, self._control_address)
        except ConfigError as error:
            self._ranks.kill(pool)
            now = time.monotonic()
            self._do(gangs, gangs.on_start_failed(action.name, action.start, str(error), now))

    # -- the end -----------------------------------------------------------------------------------

    def pids(self) -> dict[str, int]:
        """Process ids by name: ``coordinator``, ``prefill0/0``, ..."""
        return self._group.pids()

    def stop(self) -> None:
        """End every process: the coordinator first, which ends the ranks; then all that is left."""
        self._group.end_fork_server()
        self._group.terminate(COORDINATOR)
        self._group.wait_ended(FAREWELL_S)
        self._ranks.stop()
        self._group.stop()
