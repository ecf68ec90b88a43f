"""A model whose KV is a few bytes and whose next token needs every one of them in its place.

The state of a prefix is a number; K and V of a token, in each layer and head, are numbers made of
that state, the layer and the head. The next token is a function of all rows with their positions,
as they are found in the ranks' memories: a stale, foreign, missing or misplaced block gives a wrong
token, up to one chance in VOCAB_SIZE.
"""

import zlib
from collections.abc import Iterable, Sequence

from kvtransfer.plan import ByteRun
from protocol.kv import KVLayout

NUM_LAYERS, NUM_HEADS, BLOCK_SIZE = 2, 2, 4
VOCAB_SIZE = 4001
_MASK = 0xFFFFFFFF
_PRIME = (1 << 61) - 1


def layout(num_blocks: int, tp_rank: int, tp_size: int) -> KVLayout:
    """Of one rank: a row of K or V is one 32-bit number."""
    return KVLayout(NUM_LAYERS, num_blocks, NUM_HEADS, tp_rank, tp_size, BLOCK_SIZE, 1, "float32")


def states(token_ids: Iterable[int]) -> list[int]:
    """The state of every prefix."""
    found, state = [], 0x9E3779B9
    for token_id in token_ids:
        state = ((state ^ token_id) * 0x01000193 + 0x7F4A7C15) & _MASK
        state ^= state >> 15
        found.append(state)
    return found


def row(state: int, layer: int, head: int) -> int:
    mixed = (state ^ (layer * 0x85EBCA6B) ^ (head * 0xC2B2AE35)) * 0x27D4EB2F + layer + 1
    return (mixed ^ (mixed >> 13)) & _MASK


def weigh(k: int, v: int, place: tuple[int, int, int]) -> int:
    """What a row adds; ``place`` is (position, layer, head)."""
    position, layer, head = place
    return k * (2 * position + 1) * (layer + 1) + v * (3 * position + 2) * (head + 1)


def token_of(total: int) -> int:
    return (total % _PRIME * 2654435761 >> 9) % VOCAB_SIZE


def reference(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What follows a prompt when nothing goes wrong."""
    tokens, total, num_seen = list(prompt), 0, 0
    for _ in range(num_tokens):
        found = states(tokens)
        total += sum(_all_rows(place, found[place]) for place in range(num_seen, len(tokens)))
        num_seen = len(tokens)
        tokens.append(token_of(total))
    return tokens[len(prompt) :]


def _all_rows(position: int, state: int) -> int:
    total = 0
    for layer in range(NUM_LAYERS):
        for head in range(NUM_HEADS):
            k = row(state, layer, head)
            total += weigh(k, k ^ _MASK, (position, layer, head))
    return total


def positions_of(logical: int, end: int) -> range:
    """Of a sequence's first ``end`` tokens, those in a block."""
    return range(logical * BLOCK_SIZE, min((logical + 1) * BLOCK_SIZE, end))


class Memory:
    """One rank's KV, as bytes in the order of its layout."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.bytes = bytearray(b"\xa5" * layout.num_bytes)
        self._words = memoryview(self.bytes).cast("I")

    def write(self, layers: range, block_id: int, position: int, state: int) -> None:
        """K and V of one token of these layers, for all heads of this rank."""
        offset = position % BLOCK_SIZE
        for layer in layers:
            for head in range(self.layout.num_kv_heads):
                base = self.layout.offset(layer, block_id, head) // 4 + offset
                k = row(state, layer, head + self.layout.first_kv_head)
                self._words[base], self._words[base + BLOCK_SIZE] = k, k ^ _MASK

    def total(self, block_id: int, positions: range) -> int:
        """What the rows of a block add; ``positions`` are the ones that it holds."""
        total = 0
        for layer in range(NUM_LAYERS):
            for head in range(self.layout.num_kv_heads):
                base = self.layout.offset(layer, block_id, head) // 4
                number = head + self.layout.first_kv_head
                for position in positions:
                    at = base + position % BLOCK_SIZE
                    k, v = self._words[at], self._words[at + BLOCK_SIZE]
                    total += weigh(k, v, (position, layer, number))
        return total

    def save(self, block_id: int) -> list[bytes]:
        """Each layer's part of a block."""
        return [bytes(self.bytes[place]) for place in self._parts(block_id)]

    def restore(self, block_id: int, saved: Sequence[bytes]) -> None:
        for place, part in zip(self._parts(block_id), saved, strict=True):
            self.bytes[place] = part

    def _parts(self, block_id: int) -> list[slice]:
        starts = [self.layout.offset(layer, block_id, 0) for layer in range(NUM_LAYERS)]
        return [slice(start, start + self.layout.block_bytes) for start in starts]

    def read_from(self, source: "Memory", runs: Sequence[ByteRun]) -> None:
        """What a transport does when the bytes of a read land."""
        for run in runs:
            found = source.bytes[run.source_offset : run.source_offset + run.num_bytes]
            self.bytes[run.target_offset : run.target_offset + run.num_bytes] = found

    def source_checksum(self, runs: Sequence[ByteRun]) -> int:
        return self._checksum((run.source_offset, run.num_bytes) for run in runs)

    def target_checksum(self, runs: Sequence[ByteRun]) -> int:
        return self._checksum((run.target_offset, run.num_bytes) for run in runs)

    def _checksum(self, pieces: Iterable[tuple[int, int]]) -> int:
        found = 0
        for start, size in pieces:
            found = zlib.crc32(self.bytes[start : start + size], found)
        return found
