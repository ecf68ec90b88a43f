"""Token ids, packed: a prompt of a million is one piece of memory, and is sent as it lies there.

::

    0xdd, count as 4 bytes | 0xce, id as 4 bytes | 0xce, id as 4 bytes | ...     big-endian

That is msgpack's array of unsigned integers with none of them shortened, so the place of each is
known. To make a tuple of a million ids, or to send one, takes a tenth of a second. Packed ids are
made once, where text becomes ids, and only copied from there on.
"""

import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import cast, overload

_HEADER = struct.Struct(">BI")
_ITEM = struct.Struct(">xI")
_ARRAY, _UINT = 0xDD, 0xCE


class TokenIds(Sequence[int]):
    """An immutable sequence of token ids; a slice of it is a tuple.

    Args:
        packed: as in the module's docstring, from :attr:`packed` of another.
    """

    __slots__ = ("packed",)

    def __init__(self, packed: bytes | memoryview) -> None:
        kind, count = _HEADER.unpack_from(packed)
        assert kind == _ARRAY and len(packed) == _HEADER.size + count * _ITEM.size, "not token ids"
        self.packed = packed

    @staticmethod
    def of(token_ids: Sequence[int]) -> "TokenIds":
        """These ids, each in [0, 2**32), packed; what is packed already is returned as it is."""
        if isinstance(token_ids, TokenIds):
            return token_ids
        return TokenIds(_HEADER.pack(_ARRAY, len(token_ids)) + _items(token_ids))

    def head(self, count: int) -> "TokenIds":
        """The first ``count`` of them, or all there are."""
        count = min(count, len(self))
        items = self._view(0, count)
        return TokenIds(b"".join((_HEADER.pack(_ARRAY, count), items)))

    def followed_by(self, token_ids: Sequence[int]) -> "TokenIds":
        """These, and then others."""
        count = len(self) + len(token_ids)
        items = self._view(0, len(self))
        return TokenIds(b"".join((_HEADER.pack(_ARRAY, count), items, _items(token_ids))))

    def as_field(self) -> tuple[int, ...]:
        """This, for a message's field of token ids, whose receiver decodes a tuple.

        The sender's type is a sequence as good as one, and the encoder copies it (protocol/codec).
        """
        return cast(tuple[int, ...], self)

    def little(self) -> bytes:
        """Four bytes for each, little-endian: as files and block hashes have them."""
        packed = bytes(self.packed)[_HEADER.size :]
        data = bytearray(4 * len(self))
        for place in range(4):
            data[place::4] = packed[4 - place :: _ITEM.size]
        return bytes(data)

    def _view(self, start: int, stop: int) -> memoryview:
        size = _ITEM.size
        return memoryview(self.packed)[_HEADER.size + start * size : _HEADER.size + stop * size]

    def __len__(self) -> int:
        return (len(self.packed) - _HEADER.size) // _ITEM.size

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[int, ...]: ...
    def __getitem__(self, index: int | slice) -> int | tuple[int, ...]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return tuple(self)[index]
            return tuple(item for (item,) in _ITEM.iter_unpack(self._view(start, max(start, stop))))
        place = range(len(self))[index]
        item: int = _ITEM.unpack_from(self.packed, _HEADER.size + place * _ITEM.size)[0]
        return item

    def __iter__(self) -> Iterator[int]:
        return (item for (item,) in _ITEM.iter_unpack(self._view(0, len(self))))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, TokenIds):
            return self.packed == other.packed
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"TokenIds.of({self[:8]}{'...' if len(self) > 8 else ''})"


def _items(token_ids: Sequence[int]) -> bytes:
    native = array("I", token_ids)
    if sys.byteorder == "little":
        native.byteswap()
    big = native.tobytes()
    items = bytearray(_ITEM.size * len(native))
    items[0 :: _ITEM.size] = bytes([_UINT]) * len(native)
    for place in range(4):
        items[place + 1 :: _ITEM.size] = big[place::4]
    return bytes(items)
