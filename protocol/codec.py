"""Msgpack on the wire: one version byte, then a tagged Struct. Never pickle, never extensions."""

from typing import Any, Generic, TypeVar

import msgspec

from protocol.errors import VersionError
from protocol.messages import PROTOCOL_VERSION
from protocol.token_ids import TokenIds


def _as_encoded(value: Any) -> msgspec.Raw:  # noqa: ANN401 - what a message may hold
    if isinstance(value, TokenIds):
        return msgspec.Raw(value.packed)
    raise TypeError(f"a message cannot hold a {type(value).__name__}")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_as_encoded)
_VERSION_BYTE = bytes([PROTOCOL_VERSION])


T = TypeVar("T")


class Codec(Generic[T]):
    """Encodes and decodes one closed union of messages, for example ``Codec(ToRank)``."""

    def __init__(self, union: Any) -> None:  # noqa: ANN401 - a typing union has no narrower type
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)

    def encode(self, message: T) -> bytes:
        return _VERSION_BYTE + _ENCODER.encode(message)

    def decode(self, frame: bytes | memoryview) -> T:
        """The message in ``frame``.

        Raises:
            VersionError: the frame is of another protocol version, or not one of the union.
        """
        view = memoryview(frame)
        if len(view) == 0 or view[0] != PROTOCOL_VERSION:
            got = view[0] if len(view) else None
            raise VersionError(f"protocol version {got}, this side speaks {PROTOCOL_VERSION}")
        try:
            return self._decoder.decode(view[1:])
        except msgspec.DecodeError as error:  # ValidationError is one
            raise VersionError(f"undecodable message: {error}") from error
