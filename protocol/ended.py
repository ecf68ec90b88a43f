"""Which attempts are over: a pool's memory of requests that it holds nothing of any more. Pure."""

from collections import OrderedDict

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
