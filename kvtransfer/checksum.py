"""The checksum of a segment: CRC-32 over the bytes of its runs, in plan order.

The source sums what it has finished, before it announces; the target sums what has landed. Plan
order depends on the source's blocks alone, so both go over the same bytes in the same order.
"""

import zlib
from collections.abc import Sequence

from kvcache.pool import KVPool
from kvtransfer.plan import Run


def source_checksum(pool: KVPool, runs: Sequence[Run]) -> int:
    """CRC-32 of the runs in the source's own pool; see :func:`kvtransfer.plan.source_runs`."""
    return _checksum(pool, [(run.source_offset, run.num_bytes) for run in runs])


def target_checksum(pool: KVPool, runs: Sequence[Run]) -> int:
    """CRC-32 of the runs in the target's own pool, after the read is DONE."""
    return _checksum(pool, [(run.target_offset, run.num_bytes) for run in runs])


def _checksum(pool: KVPool, spans: list[tuple[int, int]]) -> int:
    value = 0
    for offset, num_bytes in spans:
        piece = pool.bytes[offset : offset + num_bytes].cpu()  # no copy on CPU
        value = zlib.crc32(piece.numpy().data, value)
    return value
