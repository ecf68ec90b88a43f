"""The wire format between the two ends of a TCP read.

1. source -> reader: ``NONCE_BYTES`` of randomness;
2. reader -> source: a nonce of its own and the reader's proof, over both nonces and the incarnation
   of the source; the token itself never travels, and a proof is useless to a process that listens
   at a dead rank's port;
3. source -> reader: the source's proof, over the same, before any byte of its pool;
4. reader -> source, any number of times, without waiting for that: a uint32 count, then (uint64
   offset, uint64 bytes) each;
5. source -> reader: those bytes of its pool, in that order, without any framing.

Both ends are proven when a connection begins; what follows is in clear and not signed.

A peer that breaks this is disconnected; there are no error messages. Integers are little-endian.
"""

import struct
from collections.abc import Sequence

from protocol.proof import prove

NONCE_BYTES = 16
HANDSHAKE_TIMEOUT_S = 5.0
MAX_RUNS = 1 << 18
COUNT = struct.Struct("<I")
RUN = struct.Struct("<QQ")

_MAX_VIEWS = 512  # per system call; Linux allows 1024
_MAX_VIEW_BYTES = 4 << 20


def prove_end(token: str, end: str, incarnation: str, source: bytes, reader: bytes) -> bytes:
    """The proof that an end, "reader" or "source", knows the token.

    It covers the incarnation whose pool is read, and the nonces of both ends.
    """
    return prove(token, f"baton 3 kv {end}", incarnation.encode(), source, reader)


class Cursor:
    """How far a list of pieces of one memory has been sent or received."""

    def __init__(self, memory: memoryview, spans: Sequence[tuple[int, int]]) -> None:
        self._memory = memory
        self._spans = spans  # (offset, bytes), none empty
        self._index = 0
        self._done = 0  # bytes of the present span

    @property
    def is_done(self) -> bool:
        return self._index == len(self._spans)

    def views(self) -> list[memoryview]:
        """The next pieces, as many as one system call should take."""
        views = []
        room = _MAX_VIEW_BYTES
        skip = self._done
        for offset, num_bytes in self._spans[self._index : self._index + _MAX_VIEWS]:
            size = min(num_bytes - skip, room)
            views.append(self._memory[offset + skip : offset + skip + size])
            room -= size
            skip = 0
            if not room:
                break
        return views

    def advance(self, num_bytes: int) -> None:
        """Count bytes that a call has moved."""
        self._done += num_bytes
        while self._index < len(self._spans) and self._done >= self._spans[self._index][1]:
            self._done -= self._spans[self._index][1]
            self._index += 1
