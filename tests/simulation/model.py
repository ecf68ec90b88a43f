"""A model whose KV is a few bytes and whose next token needs every one of them in its place.

The state of a prefix is a number; K and V of a token, in each layer and head, are numbers made of
that state, the layer and the head. The next token is a function of all rows with their positions,
as they are found in the ranks' memories: a stale, foreign, missing or misplaced block gives a wrong
token, up to one chance in VOCAB_SIZE.
"""

from collections.abc import Iterable, Sequence

from bench.simulate.ranks import Memory
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


def write(memory: Memory, layers: range, block_id: int, position: int, state: int) -> None:
    """K and V of one token of these layers, for all heads of the rank."""
    offset, layout = position % BLOCK_SIZE, memory.layout
    for layer in layers:
        for head in range(layout.num_kv_heads):
            base = layout.offset(layer, block_id, head) // 4 + offset
            k = row(state, layer, head + layout.first_kv_head)
            memory.words[base], memory.words[base + BLOCK_SIZE] = k, k ^ _MASK


def total(memory: Memory, block_id: int, positions: range) -> int:
    """What the rows of a block add; ``positions`` are the ones that it holds."""
    found, layout = 0, memory.layout
    for layer in range(NUM_LAYERS):
        for head in range(layout.num_kv_heads):
            base = layout.offset(layer, block_id, head) // 4
            number = head + layout.first_kv_head
            for position in positions:
                at = base + position % BLOCK_SIZE
                k, v = memory.words[at], memory.words[at + BLOCK_SIZE]
                found += weigh(k, v, (position, layer, number))
    return found
