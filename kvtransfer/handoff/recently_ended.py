"""Hand-offs that are over, by key: a late message of one is told from one of an unknown one."""

from collections import OrderedDict

from kvtransfer.handoff.actions import Key

MAX_TOMBS = 4_096


class RecentlyEnded:
    """The last ``MAX_TOMBS`` closed hand-offs of one side of a rank."""

    def __init__(self) -> None:
        self._keys: OrderedDict[Key, None] = OrderedDict()

    def add(self, key: Key) -> None:
        self._keys[key] = None
        self._keys.move_to_end(key)
        if len(self._keys) > MAX_TOMBS:
            self._keys.popitem(last=False)

    def __contains__(self, key: Key) -> bool:
        return key in self._keys
