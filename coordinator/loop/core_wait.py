"""How long a thread has waited for a core, as Linux tells it."""

import os
from contextlib import suppress


class CoreWait:
    """Of the thread that makes it. Close it in the end."""

    def __init__(self) -> None:
        self._file = -1
        with suppress(OSError):  # another system, or a kernel without these figures
            self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def waited_s(self) -> float:
        """Seconds so far in which it could have run and had no core; 0 where nobody knows."""
        if self._file < 0:
            return 0.0
        _, waited_ns, _ = os.pread(self._file, 100, 0).split()  # on a core, waiting, time slices
        return int(waited_ns) / 1e9

    def close(self) -> None:
        """Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
