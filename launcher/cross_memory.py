"""Whether a process may read another one's memory here, as UCX does in shared memory (CMA)."""

import ctypes
import os
from pathlib import Path

_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
_ADMIN_ONLY = 2  # and above; below it a process can allow it, as UCX does


class _Piece(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def can_read_processes() -> bool:
    """Whether process_vm_readv works: a container's seccomp filter, or Yama, may forbid it."""
    if _SCOPE.exists() and int(_SCOPE.read_text()) >= _ADMIN_ONLY and os.geteuid() != 0:
        return False
    source, target = ctypes.create_string_buffer(b"x"), ctypes.create_string_buffer(1)
    remote = _Piece(ctypes.addressof(source), 1)
    local = _Piece(ctypes.addressof(target), 1)
    read = getattr(ctypes.CDLL(None), "process_vm_readv", None)
    if read is None:  # not Linux
        return False
    read.restype = ctypes.c_ssize_t
    count = read(os.getpid(), ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    return bool(count == 1 and target.raw == b"x")
