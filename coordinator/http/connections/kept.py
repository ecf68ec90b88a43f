"""Which connections are kept when there could be too many. Pure.

A connection is *idle* until the head of a request has arrived in full, and again when it has been
answered. When there is no room for a new one, the one that has been idle for longest is closed for
it; when all are at work, the new one is refused.
"""

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

RESERVED_FILES = 256  # for all that is no caller's connection: ranks, files, databases


class Closable(Protocol):
    """A connection, as far as this is concerned."""

    def close_idle(self) -> None:
        """Close it; nothing of a request is lost."""
        ...


C = TypeVar("C", bound=Closable)


def max_connections(configured: int, max_files: int) -> int:
    """As many as are configured and the limit of open files leaves room for."""
    return max(1, min(configured, max_files - min(RESERVED_FILES, max_files // 2)))


class Connections(Generic[C]):
    """All open connections.

    Args:
        max_open: at one time.
    """

    def __init__(self, max_open: int) -> None:
        self.max_open = max_open
        self.num_refused = 0
        self.num_closed_idle = 0  # to make room
        self.num_accept_errors = 0
        self._open: dict[C, None] = {}
        self._idle: OrderedDict[C, None] = OrderedDict()  # the longest first

    def __len__(self) -> int:
        return len(self._open)

    @property
    def num_at_work(self) -> int:
        return len(self._open) - len(self._idle)

    @property
    def num_free(self) -> int:
        return self.max_open - len(self._open)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def admit(self, num_coming: int = 0) -> bool:
        """Whether there is room for another one beside those that are being opened, made if need
        be; a refusal is counted."""
        if self.num_free > num_coming or self.make_room():
            return True
        self.num_refused += 1
        return False

    def make_room(self) -> bool:
        """Close the connection that has been idle for longest, if one is."""
        if not self._idle:
            return False
        connection, _ = self._idle.popitem(last=False)
        del self._open[connection]  # its end is only a pass of the loop away
        self.num_closed_idle += 1
        connection.close_idle()
        return True

    def opened(self, connection: C) -> None:
        self._open[connection] = self._idle[connection] = None

    def at_work(self, connection: C) -> None:
        """The head of a request has arrived."""
        self._idle.pop(connection, None)

    def answered(self, connection: C) -> None:
        """Nothing is owed to it."""
        if connection in self._open:
            self._idle[connection] = None

    def closed(self, connection: C) -> None:
        """Idempotent."""
        self._open.pop(connection, None)
        self._idle.pop(connection, None)
