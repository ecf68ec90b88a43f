"""The process that ranks are forked from: ``python -P -m launcher.supervise.fork_server``.

A fork has one thread, the one that forked; a lock that another one held would stay locked in it. So
this process must have a single thread, and reports that it is of no use if a library has started
another. It does not load NIXL, UCX or CUDA: what they open belongs to one process.
"""

import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from protocol.process.ending import ASKED, die_with_parent

MAX_COMMAND_BYTES, MAX_DESCRIPTORS = 16 << 10, 16
_ARG_START, _ARG_END = 45, 46  # fields of /proc/PID/stat behind the name


def main() -> None:
    """Import, write ``{"preloaded": USABLE}``, then fork until the launcher closes its end."""
    number, parent_pid, *modules = sys.argv[1:-1]  # the last is room for the titles of forks
    die_with_parent(int(parent_pid))
    for asked in ASKED:  # these mean the whole cluster, which the launcher ends
        signal.signal(asked, signal.SIG_IGN)
    launcher = socket.socket(fileno=int(number))
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection in a fork would write to pages that all of them share
    sys.stdout.write(json.dumps({"preloaded": _has_one_thread()}) + "\n")
    sys.stdout.flush()
    while True:
        command, descriptors, _, _ = socket.recv_fds(launcher, MAX_COMMAND_BYTES, MAX_DESCRIPTORS)
        if not command:
            return
        argv, numbers = json.loads(command)
        fork = Fork(argv, dict(zip(numbers, descriptors, strict=True)))
        launcher.send(json.dumps(fork.start(launcher)).encode())
        for descriptor in descriptors:
            os.close(descriptor)


def _has_one_thread() -> bool:
    # OpenBLAS starts threads when it is loaded, and ends them before the first fork.
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return len(os.listdir("/proc/self/task")) == 1


class Fork:
    """One process that is to be forked.

    Args:
        argv: the module that it runs, and its arguments.
        descriptors: ours that it is to have, by their number in it.
    """

    def __init__(self, argv: list[str], descriptors: dict[int, int]) -> None:
        self._argv = argv
        self._descriptors = descriptors

    def start(self, launcher: socket.socket) -> dict[str, int | str]:
        """Fork it as a child of the launcher.

        ::

            server -- fork --> parent -- fork --> child
               |<--- its id ----| ends              | waits until it is an orphan, and so the
               | closes ``ours`` ------------------>| launcher's child; only then it goes on

        Returns:
            ``{"pid": ...}``, or ``{"error": REASON}``.
        """
        ours, theirs = socket.socketpair()
        with ours, theirs:
            try:
                parent = os.fork()
            except OSError as error:
                return {"error": str(error)}
            if parent == 0:
                ours.close()
                self._be_parent(launcher, theirs)
            theirs.close()
            os.waitpid(parent, 0)
            pid = ours.recv(32)
            return {"pid": int(pid)} if pid else {"error": "no second process"}

    def _be_parent(self, launcher: socket.socket, server: socket.socket) -> NoReturn:
        try:
            pid = os.fork()
            if pid == 0:
                launcher.close()
                server.recv(1)
                server.close()
                self._be_child()
            server.send(str(pid).encode())
        finally:
            os._exit(0)

    def _be_child(self) -> NoReturn:
        code = 1
        try:
            for asked in ASKED:
                signal.signal(asked, signal.SIG_DFL)
            self._take_descriptors()
            set_title([sys.executable, "-P", "-m", *self._argv])
            sys.argv = self._argv
            runpy.run_module(self._argv[0], run_name="__main__", alter_sys=True)
            code = 0
        except BaseException:  # noqa: BLE001 - the outermost frame of a process
            traceback.print_exc()
        finally:  # nothing of it may go on as the server
            os._exit(code)

    def _take_descriptors(self) -> None:
        # First move all above the numbers that are wanted, so that none is overwritten.
        above = max(self._descriptors) + 1
        for number, ours in self._descriptors.items():
            high = fcntl.fcntl(ours, fcntl.F_DUPFD, above)
            os.close(ours)
            self._descriptors[number] = high
        for number, high in self._descriptors.items():
            os.dup2(high, number)
            os.close(high)


def set_title(argv: list[str]) -> None:
    """Have the kernel show ``argv`` as this process's command line, as far as there is room."""
    title = b"".join(word.encode() + b"\0" for word in argv)
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
    # The last byte stays 0: otherwise the kernel takes all of it for a single string.
    ctypes.memmove(start, title[: end - start - 1].ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    main()
