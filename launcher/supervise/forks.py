"""Ranks as forks of one process that has imported what all of them need.

Each rank would spend more than a second on importing torch; a gang that starts again would do so
while its requests wait. The fork server (fork_server.py) has imported it once: a fork has it at
once, and shares its pages with the others.

1. The launcher starts the server first, with the environment that the ranks need: variables that
   libraries read when they are loaded hold for the forks as well. It writes ``preloaded`` to its
   standard output when it is ready.
2. ``fork`` sends it a command and the descriptors for the output, and gets a process id back.
3. The fork is the launcher's own child, not the server's: its parent ends at once, and meanwhile
   the launcher is the subreaper, which inherits orphans. So the fork dies with the launcher, and
   the launcher waits for it. When the server ends, its forks go on, and the next rank is started
   the long way.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

REPLY_S = 5.0  # a server that does not answer is given up
MAX_REPLY_BYTES = 4096
MAX_TITLE_BYTES = 256  # by which the command line of a fork may be longer than the server's
_STDOUT, _STDERR = 1, 2
_PR_SET_CHILD_SUBREAPER = 36


class ForkServerGone(Exception):
    """It has ended, or does not answer. Nothing was started."""


class ForkedProcess:
    """A child that a fork server has made; the part of ``subprocess.Popen`` that children need."""

    def __init__(self, pid: int, stdout: IO[bytes], stderr: IO[bytes]) -> None:
        self.pid = pid
        self.stdout = stdout
        self.stderr = stderr
        self._code: int | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._reap, daemon=True).start()

    def _reap(self) -> None:
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:  # no signal is on its way to an id that another process may have then
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._ended.set()

    def poll(self) -> int | None:
        """Its exit code, minus the number of the signal that ended it; None while it runs."""
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if not self._ended.wait(timeout):
            assert timeout is not None
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        assert self._code is not None
        return self._code

    def send_signal(self, number: int) -> None:
        """Send a signal; nothing happens if the process has ended."""
        with self._lock:
            if self._code is None:
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_piped(
    argv: Sequence[str], environment: Mapping[str, str], pass_fds: Sequence[int] = ()
) -> "subprocess.Popen[bytes]":
    """Start a command with pipes for its outputs, and nothing to read."""
    return subprocess.Popen(
        argv,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        pass_fds=pass_fds,
    )


class ForkServer:
    """The launcher's end of a fork server.

    Args:
        modules: what it imports.
        environment: its own, and that of its forks.
    """

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self._modules = modules
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.settimeout(REPLY_S)

    def start(self) -> "subprocess.Popen[bytes]":
        """Start its process. Once only."""
        with self._theirs:
            number = self._theirs.fileno()
            argv = [sys.executable, "-P", "-m", "launcher.supervise.fork_server", str(number)]
            argv += [str(os.getpid()), *self._modules, " " * MAX_TITLE_BYTES]
            return start_piped(argv, self.environment, pass_fds=(number,))

    def fork(self, *argv: str, pass_fds: Sequence[int] = ()) -> ForkedProcess:
        """Start the same as ``python -P -m argv``; call it in the main thread.

        Args:
            argv: a module and its arguments.
            pass_fds: descriptors that it has under the same numbers.

        Raises:
            ForkServerGone: see there.
            OSError: the system does not let it fork.
        """
        with contextlib.ExitStack() as inputs, contextlib.ExitStack() as on_failure:
            descriptors = {number: number for number in pass_fds}
            streams = []
            for number in (_STDOUT, _STDERR):
                read, descriptors[number] = os.pipe()
                inputs.callback(os.close, descriptors[number])
                streams.append(on_failure.enter_context(os.fdopen(read, "rb", buffering=0)))
            pid = self._ask(argv, descriptors)
            on_failure.pop_all()
            return ForkedProcess(pid, *streams)

    def _ask(self, argv: Sequence[str], descriptors: Mapping[int, int]) -> int:
        command = json.dumps([argv, [*descriptors]]).encode()
        try:
            with _inheriting_orphans():
                socket.send_fds(self._ours, [command], [*descriptors.values()])
                reply = self._ours.recv(MAX_REPLY_BYTES)
        except OSError as error:
            raise ForkServerGone(f"does not answer: {error}") from error
        if not reply:
            raise ForkServerGone("has ended")
        said = json.loads(reply)
        if "error" in said:
            raise OSError(said["error"])
        return int(said["pid"])

    def close(self) -> None:
        """Close the connection, which ends the server."""
        self._ours.close()


@contextlib.contextmanager
def _inheriting_orphans() -> Iterator[None]:
    """Be a subreaper for the moment of a fork, and not for other orphans, which go to init."""
    prctl = ctypes.CDLL(None).prctl
    if prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise ForkServerGone("is of no use: the system gives us no orphans")
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
