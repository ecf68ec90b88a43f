"""Finding a prompt's prefix among the blocks that are kept. Pure.

A block's hash names its tokens *and* everything before them: each hash covers its parent's, and the
first block's parent covers the salt (model and tenant). So equal hashes mean equal KV, and no
tenant hits what another one has cached. The pools themselves know which block holds which hash.
"""

import hashlib
import struct
from collections.abc import Sequence

from kvcache.blocks import BlockPool
from protocol.kv import BlockRef

HASH_BYTES = 16
_TOKEN_BYTES = 4


def block_salt(model_fingerprint: str, cache_salt: str) -> str:
    """What every hash of a prompt's blocks covers: the model, and the tenant's salt."""
    return f"{model_fingerprint}:{cache_salt}"


def hash_blocks(token_ids: Sequence[int], block_size: int, salt: str) -> list[bytes]:
    """The chained hash of each full block of a token sequence; a partial last block has none.

    Args:
        token_ids: each in [0, 2**32).
        block_size: tokens per block.
        salt: see :func:`block_salt`.

    Returns:
        BLAKE2b of 16 bytes for each block.
    """
    num_blocks = len(token_ids) // block_size
    num_tokens = num_blocks * block_size
    packed = memoryview(struct.pack(f"<{num_tokens}I", *token_ids[:num_tokens]))
    parent = hashlib.blake2b(salt.encode(), digest_size=HASH_BYTES).digest()
    hashes = []
    block_bytes = block_size * _TOKEN_BYTES
    for start in range(0, num_blocks * block_bytes, block_bytes):
        state = hashlib.blake2b(parent, digest_size=HASH_BYTES)
        state.update(packed[start : start + block_bytes])
        parent = state.digest()
        hashes.append(parent)
    return hashes


def match_prefix(pools: Sequence[BlockPool], hashes: Sequence[bytes]) -> list[tuple[int, BlockRef]]:
    """The longest prefix of ``hashes`` that the pools hold between them, as (pool, block) each.

    A prefix may be spread over the pools in any way; of two holders the first is taken.
    """
    matched = []
    for block_hash in hashes:
        for index, pool in enumerate(pools):
            ref = pool.find(block_hash)
            if ref is not None:
                matched.append((index, ref))
                break
        else:
            break
    return matched


def take_cache_events(
    pools: Sequence[BlockPool],
) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """Hashes that the pools taken together (newly hold, no longer hold) since the last call."""
    touched: dict[bytes, None] = {}
    for pool in pools:
        stored, evicted = pool.take_cache_events()
        touched.update(dict.fromkeys((*stored, *evicted)))
    present = {h: any(pool.find(h) is not None for pool in pools) for h in touched}
    return (
        tuple(h for h, is_present in present.items() if is_present),
        tuple(h for h, is_present in present.items() if not is_present),
    )
