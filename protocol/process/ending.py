"""The signals by which a cluster's processes are asked to end.

SIGTERM and SIGINT come from outside. A terminal sends SIGINT to all processes of a cluster, and a
service manager may send SIGTERM to all of them. So they mean the cluster and not the process: the
launcher and the coordinator end it in order, and a rank waits for these two. The launcher has
signals of its own for its children.
"""

import ctypes
import os
import signal
import sys

from protocol.errors import PeerError

ASKED = (signal.SIGTERM, signal.SIGINT)  # from outside: the cluster is to end; twice, at once
DRAIN = signal.SIGUSR1  # to the coordinator: take nothing new, end when what runs has ended
END = signal.SIGUSR2  # end now, in order
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends.

    The signal is tied to the parent's *thread* that started this process. By default it is SIGKILL,
    because a rank in a collective that will never complete obeys no other.

    Args:
        parent_pid: 0 changes nothing.
        number: of the signal.

    Raises:
        PeerError: the parent had died before.
    """
    if parent_pid == 0:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent_pid:
        raise PeerError(f"the parent process {parent_pid} is gone")
