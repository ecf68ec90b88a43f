"""What a process gives up before it reads what a stranger wrote: text workers and file parsers.

It bounds what goes wrong (memory, dumps, orphans) and refuses what neither has to do (sockets,
other programs, files that are written). Python asks before each of these; a flaw in a library of
native code does not, and has the rights of the user.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
from functools import partial
from typing import Any, NoReturn

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# What they have open already they may use: a text worker talks on a socket.
_DENIED = (
    *("socket.__new__", "socket.connect", "socket.bind", "socket.sendto", "socket.get"),
    *("subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.system", "os.kill", "pty."),
)
_DENIED_CHANGES = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.chflags", "os.utime", "os.setxattr", "shutil."),
)


def close_all_but(*kept: int) -> None:
    """Close what came with the start, but for standard streams and ``kept``.

    uvloop leaves everything open to a child that its libraries have not marked otherwise.
    """
    start = 3
    for file in (*sorted(kept), os.sysconf("SC_OPEN_MAX")):
        os.closerange(start, file)
        start = file + 1


def confine(memory_bytes: int, *, may_write: bool) -> None:
    """Give it up, for good.

    Args:
        memory_bytes: of the address space.
        may_write: files can be made, opened for writing, and removed.
    """
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        prctl = ctypes.CDLL(None).prctl
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    sys.addaudithook(partial(_audit, may_write))


def _audit(may_write: bool, event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith(_DENIED):
        _deny(event)
    if may_write:
        return
    if event.startswith(_DENIED_CHANGES):
        _deny(event)
    if event == "open" and arguments[2] & _WRITING:  # of open() too the flags are told
        _deny(f"{event} {arguments[0]!r} for writing")


def _deny(what: str) -> NoReturn:
    raise PermissionError(f"a reader of untrusted text does not do this: {what}")
