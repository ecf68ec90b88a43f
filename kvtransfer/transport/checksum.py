"""The checksum of a segment: CRC-32 over the bytes of its runs, in plan order.

The source sums what it has finished, before it announces; the target sums what has landed. Plan
order depends on the source's blocks alone, so both go over the same bytes in the same order.
"""

import zlib
from collections.abc import Sequence

from kvcache.pool import KVPool
from kvtransfer.plan import ByteRun


class PoolChecksums:
    """The checksums of a rank's KV pool; see :class:`engine.rank_node.Checksums`."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool

    def source_checksum(self, runs: Sequence[ByteRun]) -> int:
        """CRC-32 of the runs in the source's own pool; see :func:`kvtransfer.plan.source_runs`."""
        return self._checksum([(run.source_offset, run.num_bytes) for run in runs])

    def target_checksum(self, runs: Sequence[ByteRun]) -> int:
        """CRC-32 of the runs in the target's own pool, after the read is DONE."""
        return self._checksum([(run.target_offset, run.num_bytes) for run in runs])

    def _checksum(self, spans: list[tuple[int, int]]) -> int:
        value = 0
        for offset, num_bytes in spans:
            piece = self._pool.bytes[offset : offset + num_bytes].cpu()  # no copy on CPU
            value = zlib.crc32(piece.numpy().data, value)
        return value
