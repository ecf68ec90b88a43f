"""Hand-offs that are over, by key: a late message of one is told from one of an unknown one."""

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
