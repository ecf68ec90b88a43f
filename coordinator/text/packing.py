"""From a worker's packed prompt to what the loop keeps of it: nothing is walked through."""

import struct

from coordinator.text.tasks import PackedPrompt
from coordinator.text.tokenizing import Prompt
from kvcache.prefix import HASH_BYTES
from protocol.token_ids import TokenIds

_HASH = struct.Struct(f"{HASH_BYTES}s")


def unpacked(packed: PackedPrompt) -> Prompt:
    """The prompt; its token ids stay in the memory that the worker has filled."""
    hashes = tuple(digest for (digest,) in _HASH.iter_unpack(packed.block_hashes))
    return Prompt(TokenIds(packed.token_ids), hashes)
