"""The keys of hand-offs that are over, so that their late messages are known to be late."""

from collections import OrderedDict

from protocol.request import RequestKey

MAX_TOMBS = 4_096


class RecentlyEnded:
    """The last ``MAX_TOMBS`` closed hand-offs of one side of a rank."""

    def __init__(self) -> None:
        self._keys: OrderedDict[RequestKey, None] = OrderedDict()

    def add(self, key: RequestKey) -> None:
        self._keys[key] = None
        self._keys.move_to_end(key)
        if len(self._keys) > MAX_TOMBS:
            self._keys.popitem(last=False)

    def __contains__(self, key: RequestKey) -> bool:
        return key in self._keys
