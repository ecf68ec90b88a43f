"""A rank's KV memory of a few bytes, in which every block says whose it is.

A *tag* is a byte that names (request, logical block); each head of it is told apart. Blocks are
written where a prompt is computed, and copied byte by byte where a real read would land.
"""

import zlib
from collections.abc import Sequence

from kvtransfer.plan import ByteRun
from protocol.kv import KVLayout

BLOCK_SIZE = 2
NOTHING = 0x00
TORN = 0xEE  # what a read that failed has left
MAX_LOGICAL = 8


def layout(num_blocks: int, num_layers: int, num_heads: int, tp: tuple[int, int]) -> KVLayout:
    """The smallest there is; ``tp`` is (rank, size)."""
    return KVLayout(num_layers, num_blocks, num_heads, *tp, BLOCK_SIZE, 1, "float16")


def tag(request: int, logical: int) -> int:
    """Of a block of a request's prompt."""
    assert logical < MAX_LOGICAL
    return 1 + request * MAX_LOGICAL + logical


class Memory:
    """One rank's KV."""

    def __init__(self, layout: KVLayout) -> None:
        self.bytes = bytearray([NOTHING]) * layout.num_bytes
        self.layout = layout

    def write(self, block_id: int, content: int) -> None:
        """All layers and heads of a block, as they are computed."""
        for offset, cell in self._cells(block_id, content):
            self.bytes[offset : offset + len(cell)] = cell

    def holds(self, block_id: int, content: int) -> bool:
        """Whether every layer and head of a block is there."""
        return all(
            self.bytes[offset : offset + len(cell)] == cell
            for offset, cell in self._cells(block_id, content)
        )

    def _cells(self, block_id: int, content: int) -> list[tuple[int, bytes]]:
        cells = []
        for layer in range(self.layout.num_layers):
            for head in range(self.layout.num_kv_heads):
                place = layer * self.layout.num_kv_heads_total + head + self.layout.first_kv_head
                half = self.layout.head_bytes // 2
                cell = bytes([content]) * half + bytes([place]) * half
                cells.append((self.layout.offset(layer, block_id, head), cell))
        return cells

    # -- reads -------------------------------------------------------------------------------------

    def source_bytes(self, runs: Sequence[ByteRun]) -> bytes:
        """What a read of these runs finds here."""
        return b"".join(
            bytes(self.bytes[run.source_offset : run.source_offset + run.num_bytes]) for run in runs
        )

    def land(self, runs: Sequence[ByteRun], found: bytes | None) -> None:
        """What a read has found elsewhere; None if it has failed on the way."""
        start = 0
        for run in runs:
            piece = bytes([TORN]) * run.num_bytes
            if found is not None:
                piece = found[start : start + run.num_bytes]
            self.bytes[run.target_offset : run.target_offset + run.num_bytes] = piece
            start += run.num_bytes

    def source_checksum(self, runs: Sequence[ByteRun]) -> int:
        return zlib.crc32(self.source_bytes(runs))

    def target_checksum(self, runs: Sequence[ByteRun]) -> int:
        pieces = (self.bytes[run.target_offset : run.target_offset + run.num_bytes] for run in runs)
        return zlib.crc32(b"".join(bytes(piece) for piece in pieces))


def blocks_of(layout: KVLayout, spans: Sequence[tuple[int, int]]) -> set[int]:
    """The blocks that these (offset, bytes) touch."""
    found: set[int] = set()
    for offset, num_bytes in spans:
        first, last = offset // layout.block_bytes, (offset + num_bytes - 1) // layout.block_bytes
        found.update(index % layout.num_blocks for index in range(first, last + 1))
    return found
