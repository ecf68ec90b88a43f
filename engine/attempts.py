"""The attempts at requests that a leader node has, and those that are over. Pure.

A message can be late: sent again, delayed, or overtaken by an abort. So an attempt that has ended
is remembered for a while, and neither it nor one before it is ever begun again.
"""

from collections import OrderedDict
from collections.abc import Iterator, ValuesView
from typing import Generic, TypeVar

from protocol.request import RequestKey

T = TypeVar("T")

MAX_ENDED = 4096


class Attempts(Generic[T]):
    """What a leader node has of each attempt, in the order in which they came.

    All attempts of one request are found at once, however many other requests wait.

    Args:
        max_ended: requests of which the latest ended attempt is remembered.
    """

    def __init__(self, max_ended: int = MAX_ENDED) -> None:
        self._max_ended = max_ended
        self._here: dict[RequestKey, T] = {}
        self._by_request: dict[str, list[int]] = {}  # attempts that are here, ascending
        self._latest: OrderedDict[str, int] = OrderedDict()  # ended attempt of each request

    def __len__(self) -> int:
        return len(self._here)

    def __iter__(self) -> Iterator[RequestKey]:
        return iter(self._here)

    def __contains__(self, key: RequestKey) -> bool:
        return key in self._here

    def __getitem__(self, key: RequestKey) -> T:
        return self._here[key]

    def get(self, key: RequestKey) -> T | None:
        return self._here.get(key)

    def values(self) -> ValuesView[T]:
        return self._here.values()

    def superseded_by(self, key: RequestKey) -> list[T] | None:
        """The earlier attempts of the same request that are here, to be given up for this one.

        Returns:
            None when this attempt is not to begin: it is here already, or it is late.
        """
        request_id, attempt = key
        here = self._by_request.get(request_id, [])
        if attempt <= max(self._latest.get(request_id, -1), *here, -1):
            return None
        return [self._here[request_id, earlier] for earlier in here]

    def begin(self, key: RequestKey, value: T) -> None:
        """Keep an attempt that is not here yet."""
        request_id, attempt = key
        self._by_request.setdefault(request_id, []).append(attempt)
        self._here[key] = value

    def end(self, key: RequestKey) -> None:
        """Forget an attempt, and remember that it is over. It need not be here."""
        request_id, attempt = key
        if self._here.pop(key, None) is not None:
            here = self._by_request[request_id]
            here.remove(attempt)
            if not here:
                del self._by_request[request_id]
        # Taken out and put back, so that the oldest entry is the first to be forgotten.
        self._latest[request_id] = max(attempt, self._latest.pop(request_id, attempt))
        if len(self._latest) > self._max_ended:
            self._latest.popitem(last=False)
