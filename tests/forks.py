"""Processes as forks of one that has imported what they need, which takes longer than they do.

A fork is in everything what ``python -P -m module arguments`` would start, but for the time. What a
forked ``launcher`` starts are forks too: its coordinator and, as ever, its ranks.
"""

import atexit
import ctypes
import fcntl
import functools
import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from bench.load.local_cluster import LocalCluster
from launcher.supervise import fork_server, forks, processes
from launcher.supervise.forks import ForkedProcess, ForkServer

_ROOT = Path(__file__).resolve().parents[1]
_PRELOADED = (
    *("coordinator.server", "coordinator.text.worker", "launcher.cli.serve", "tests.forks"),
    *("decode.worker", "prefill.worker", "store.worker", "tests.ring_attention.ring_cases"),
)
_MAIN = "tests.fork_main"
_STDOUT, _STDERR = 1, 2
_CLONE_NEWNET = 0x40000000
_is_fork = False  # of a process that has all of this imported, so that its children are too


@functools.cache
def shared_forks() -> "Forks":
    """The fork server of this process, which ends with it."""
    made = Forks()
    atexit.register(made.close)
    return made


class Forks:
    """A fork server of all that the tests start."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(_ROOT), "GLOO_SOCKET_IFNAME": "lo"}
        environment |= {"OMP_NUM_THREADS": "1", "UCX_LOG_FILE": "stderr"}  # not standard output
        self._server: ForkServer
        self._process = None
        if _is_fork:
            self._server = _ServerFork((), environment)
            self._server.begin()
            return
        self._server = ForkServer(_PRELOADED, environment)
        self._process = self._server.start()
        assert self._process.stdout is not None
        assert json.loads(self._process.stdout.readline()) == {"preloaded": True}

    def start(
        self,
        module: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        stderr: int | None = None,
        network: Path | None = None,
        folder: Path | None = None,
        pass_fds: Sequence[int] = (),
    ) -> ForkedProcess:
        """What ``python -P -m module arguments`` would start.

        Args:
            environment: all of it; by default the fork server's.
            stderr: a descriptor instead of the pipe that the process has.
            network: of ``ip netns``, in which it is.
            folder: in which it works, if not ours.
        """
        if (environment, stderr, network, folder) == (None, None, None, None):
            return self._server.fork(module, *arguments, pass_fds=pass_fds)
        variables = _changes(self._server.environment, environment or self._server.environment)
        # A number of its own: that of ours may be the one that it is to have.
        errors = [] if stderr is None else [fcntl.fcntl(stderr, fcntl.F_DUPFD, _STDERR + 1)]
        told = _Told(variables, errors, str(network or ""), str(folder or ""))
        words = (_MAIN, json.dumps(told), module, *arguments)
        try:
            process = self._server.fork(*words, pass_fds=(*pass_fds, *errors))
        finally:
            for descriptor in errors:
                os.close(descriptor)
        if errors:
            process.stderr.close()
        return process

    def run(
        self, module: str, *arguments: str, timeout_s: float = 60.0, **where: Any
    ) -> "subprocess.CompletedProcess[str]":
        """The same until it has ended, having written little; ``where`` as ``start`` has it."""
        process = self.start(module, *arguments, **where)
        try:
            said, errors = outputs(process, timeout_s)
            return subprocess.CompletedProcess((module, *arguments), process.wait(), said, errors)
        finally:
            end(process)

    def close(self) -> None:
        self._server.close()
        if self._process is not None:
            self._process.communicate(timeout=60)


class ForkedCluster(LocalCluster):
    """``baton serve``, which is a fork as its children are."""

    def _start(
        self, argv: Sequence[str], environment: Mapping[str, str], stderr: IO[str] | None
    ) -> tuple[ForkedProcess, IO[str]]:
        process = shared_forks().start(
            *argv,
            environment={**os.environ, **environment},
            stderr=_STDERR if stderr is None else stderr.fileno(),
        )
        return process, lines_of(process.stdout)


def end(process: ForkedProcess) -> None:
    """Kill it if it runs, and close what it wrote to."""
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()


def outputs(process: ForkedProcess, timeout_s: float) -> tuple[str, str]:
    """What it has written when it has ended, little of it."""
    process.wait(timeout_s)
    return process.stdout.read().decode(), process.stderr.read().decode()


def lines_of(stream: IO[bytes]) -> IO[str]:
    """A pipe's text, line by line."""
    return io.TextIOWrapper(io.BufferedReader(stream))  # type: ignore[type-var]


# -- in the forks ----------------------------------------------------------------------------------


class _Told(NamedTuple):
    """What a fork is told of its surroundings."""

    variables: dict[str, str | None]  # that differ; None takes one away
    errors: list[int]  # a descriptor for its standard error, if any
    network: str
    folder: str


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str | None]:
    """What turns one environment into the other."""
    changed = {name: value for name, value in after.items() if before.get(name) != value}
    return {**changed, **dict.fromkeys(before.keys() - after.keys())}


def main() -> NoReturn:
    """Run a module in the environment that a fork is told, and end as an interpreter would."""
    global _is_fork
    _is_fork = True
    told = _Told(*json.loads(sys.argv[1]))
    for name, value in told.variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    for descriptor in told.errors:
        os.dup2(descriptor, _STDERR)
        os.close(descriptor)
    if told.network:
        network = os.open(told.network, os.O_RDONLY)
        if ctypes.CDLL(None).setns(network, _CLONE_NEWNET) != 0:
            raise OSError(f"{told.network} cannot be entered")
    if told.folder:
        os.chdir(told.folder)
    del sys.argv[:2]
    fork_server.set_title([sys.executable, "-P", "-m", *sys.argv])
    children = _fork_children() if sys.argv[0] == "launcher" else None
    code: object = 0
    sys.modules.pop(sys.argv[0], None)  # runpy warns of a module that is imported already
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        if children is not None:
            children.end()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)


class _ServerFork(ForkServer):
    """A fork server that is itself a fork, of this process while it has a single thread."""

    def begin(self) -> None:
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                self._ours.close()
                os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
                sys.argv = ["", str(self._theirs.fileno()), str(parent), ""]
                fork_server.main()
            finally:
                os._exit(1)
        self._theirs.close()

    def end(self) -> None:
        self.close()
        os.waitpid(self._pid, 0)


def _fork_children() -> _ServerFork:
    """From now on, what this launcher starts as an interpreter is a fork."""
    os.umask(0o077)  # as the launcher will have it, which its children have from it
    environment = dict(os.environ)
    server = _ServerFork((), environment)
    server.begin()

    def start_piped(
        argv: Sequence[str], wanted: Mapping[str, str], pass_fds: Sequence[int] = ()
    ) -> ForkedProcess:
        module, *rest = argv[3:]
        arguments = [(word.strip() and word) or " " for word in rest]
        told = json.dumps(_Told(_changes(environment, wanted), [], "", ""))
        return server.fork(_MAIN, told, module, *arguments, pass_fds=pass_fds)

    vars(forks)["start_piped"] = vars(processes)["start_piped"] = start_piped
    return server
