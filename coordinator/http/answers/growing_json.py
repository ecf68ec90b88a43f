"""JSON that is made as its parts come: the end of a long answer costs no more than a join."""

from typing import Any

import msgspec

_ENCODER = msgspec.json.Encoder()


class GrowingLists:
    """An object whose lists grow by parts; what is no list stays as the first part has it."""

    def __init__(self) -> None:
        self._parts: dict[str, list[bytes]] = {}
        self._others: dict[str, Any] = {}

    def add(self, part: dict[str, Any]) -> None:
        """Each list of ``part`` goes on where that of the parts before has ended."""
        for name, value in part.items():
            if not isinstance(value, list):
                self._others.setdefault(name, value)
                continue
            parts = self._parts.setdefault(name, [])
            if value:
                parts.append(_ENCODER.encode(value)[1:-1])

    def whole(self) -> dict[str, Any]:
        """The object, for an encoder of msgspec's."""
        lists = {
            name: msgspec.Raw(b"".join((b"[", b",".join(parts), b"]")))
            for name, parts in self._parts.items()
        }
        return {**lists, **self._others}
