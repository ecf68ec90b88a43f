"""The announcements of a chunk. The leader's manifest and its ranks both follow this. Pure.

A request's chunks are numbered from 1. Chunk 0 is the cached blocks that the target lacks:
they are announced before the first chunk is computed, all layers as one group.
"""

from collections.abc import Iterator, Sequence

from protocol.handoff import SegmentKey
from protocol.plans import ChunkWork, PlacedBlock

CACHED_CHUNK = 0
DEFAULT_NUM_GROUPS = 8


def layer_groups(num_layers: int, layers_per_group: int) -> tuple[range, ...]:
    """The layers in groups that are announced together; the last may be smaller.

    Args:
        layers_per_group: 0 makes about eight groups.
    """
    size = layers_per_group or -(-num_layers // DEFAULT_NUM_GROUPS)
    return tuple(
        range(first, min(first + size, num_layers)) for first in range(0, num_layers, size)
    )


def cached_blocks(work: ChunkWork, cp_rank: int) -> list[PlacedBlock]:
    """Of ``announce_cached``, the blocks that lie on ``cp_rank``."""
    return [block for block in work.announce_cached if block.cp_rank == cp_rank]


def moving_blocks(work: ChunkWork, cp_rank: int, block_size: int) -> list[PlacedBlock]:
    """The chunk's own blocks on ``cp_rank`` that the target does not hold already."""
    if work.route is None:
        return []
    first = max(work.start // block_size, work.route.first_logical)
    return [block for block in work.blocks[first:] if block.cp_rank == cp_rank]


def segment_keys(
    work: ChunkWork, *, tp_size: int, block_size: int, groups: Sequence[range]
) -> Iterator[SegmentKey]:
    """The keys of everything that the pool's ranks announce for ``work``."""
    for cp_rank in work.ring:
        for rank in range(cp_rank * tp_size, (cp_rank + 1) * tp_size):
            if cached_blocks(work, cp_rank):
                yield SegmentKey(
                    source_rank=rank,
                    chunk=CACHED_CHUNK,
                    layer_start=groups[0].start,
                    layer_end=groups[-1].stop,
                )
            if moving_blocks(work, cp_rank, block_size):
                for group in groups:
                    yield SegmentKey(
                        source_rank=rank,
                        chunk=work.chunk,
                        layer_start=group.start,
                        layer_end=group.stop,
                    )
