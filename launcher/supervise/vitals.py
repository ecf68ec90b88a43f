"""A look at a process from outside, through ``/proc``.

The threads of libzmq do not count: they answer the heartbeats of every rank even if the process
itself hangs.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from launcher.supervise.silence import Vitals

_NOT_ITS_OWN = "ZMQbg"  # how libzmq names its threads
_STATE, _UTIME, _STIME = 0, 11, 12  # fields of stat after the name, see proc_pid_stat(5)
_RUNNING = frozenset("RD")


def read_vitals(pid: int) -> Vitals | None:
    """The vitals of process ``pid``; None if it is gone, or this is not Linux."""
    threads = list(_threads(pid))
    if not threads:
        return None
    ticks = sum(int(fields[_UTIME]) + int(fields[_STIME]) for fields in threads)
    is_running = any(fields[_STATE] in _RUNNING for fields in threads)
    return Vitals(ticks / os.sysconf("SC_CLK_TCK"), is_running)


def _threads(pid: int) -> Iterator[list[str]]:
    for file in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            head, _, rest = file.read_text().rpartition(")")
        except OSError:
            continue  # it has ended meanwhile
        if not head.partition("(")[2].startswith(_NOT_ITS_OWN):
            yield rest.split()
