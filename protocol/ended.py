"""Attempts: those that a pool has, and its memory of those that are over. Pure."""

from collections import OrderedDict
from typing import TypeVar

T = TypeVar("T")

MAX_ENDED = 4096


class EndedAttempts:
    """The latest ended attempt of each of the last ``max_requests`` requests.

    What comes of an ended attempt, or of one before it, is late: a duplicate, or a message that was
    overtaken by an abort.
    """

    def __init__(self, max_requests: int = MAX_ENDED) -> None:
        self._max_requests = max_requests
        self._latest: OrderedDict[str, int] = OrderedDict()

    def add(self, request_id: str, attempt: int) -> None:
        self._latest[request_id] = max(attempt, self._latest.pop(request_id, attempt))
        if len(self._latest) > self._max_requests:
            self._latest.popitem(last=False)

    def covers(self, request_id: str, attempt: int) -> bool:
        """Whether this attempt, or one after it, has ended."""
        latest = self._latest.get(request_id)
        return latest is not None and attempt <= latest


class ByAttempt(dict[tuple[str, int], T]):
    """What a pool has of each (request id, attempt), in the order in which they came.

    All attempts of a request are found at once, however many others wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self._attempts: dict[str, list[int]] = {}

    def __setitem__(self, key: tuple[str, int], value: T) -> None:
        if key not in self:
            self._attempts.setdefault(key[0], []).append(key[1])
        super().__setitem__(key, value)

    def __delitem__(self, key: tuple[str, int]) -> None:
        super().__delitem__(key)
        attempts = self._attempts[key[0]]
        attempts.remove(key[1])
        if not attempts:
            del self._attempts[key[0]]

    def of(self, request_id: str) -> list[T]:
        """What there is of any attempt of a request."""
        return [self[request_id, attempt] for attempt in self._attempts.get(request_id, ())]
