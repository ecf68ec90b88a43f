"""Which bytes go from which rank to which rank. Pure, and total over every CP x TP on either side.

Context parallelism on a side only decides which rank owns a block; a plan is made for one source
rank and one target rank, from the blocks that the one owns and the other needs. Tensor parallelism
decides which heads the two have in common. Everything else is :class:`protocol.kv.KVLayout`.
"""

from collections.abc import Iterable, Sequence

import msgspec

from protocol.errors import TransferError, VersionError
from protocol.kv import KVLayout


class ByteRun(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Bytes that lie in one piece on both sides; offsets are from each side's pool base."""

    source_offset: int
    target_offset: int
    num_bytes: int


def plan(
    source: KVLayout, target: KVLayout, layers: range, pairs: Sequence[tuple[int, int]]
) -> list[ByteRun]:
    """The runs that this target rank reads from this source rank.

    In the order of (layer, source block), whatever the order of ``pairs``; runs that are adjacent
    on both sides are joined.

    Args:
        source: layout of the rank that owns the blocks.
        target: layout of the rank that reads them.
        layers: which layers, ascending.
        pairs: (source block id, target block id) of each block; on either side each occurs once.

    Returns:
        The runs; none when the two ranks have no heads in common.

    Raises:
        VersionError: the layouts are not of the same model and block size.
        TransferError: a layer or a block does not exist.
    """
    if not source.is_compatible(target):
        raise VersionError(f"KV cannot move between {source} and {target}")
    heads = shared_heads(source, target)
    if not heads or not pairs or not layers:
        return []
    _check_exists(source, target, layers, pairs)
    source_head = heads.start - source.first_kv_head
    target_head = heads.start - target.first_kv_head
    layer = layers[0]
    of_one_layer = _join(
        ByteRun(
            source.offset(layer, source_block, source_head),
            target.offset(layer, target_block, target_head),
            len(heads) * source.head_bytes,
        )
        for source_block, target_block in sorted(pairs)
    )
    # The other layers are the same runs, shifted on each side by whole layers.
    shifts = [
        (
            source.offset(other, 0, 0) - source.offset(layer, 0, 0),
            target.offset(other, 0, 0) - target.offset(layer, 0, 0),
        )
        for other in layers
    ]
    spans = [(run.source_offset, run.target_offset, run.num_bytes) for run in of_one_layer]
    runs = [ByteRun(s + ds, t + dt, n) for ds, dt in shifts for s, t, n in spans]
    if len(layers) > 1 and _is_adjacent(runs[len(spans) - 1], runs[len(spans)]):
        return _join(runs)  # the end of one layer and the beginning of the next
    return runs


def source_runs(
    source: KVLayout, target: KVLayout, layers: range, block_ids: Iterable[int]
) -> list[ByteRun]:
    """What :func:`plan` would read of these source blocks, for a source that does not know where
    they go: same source bytes in the same order, target offsets meaningless.

    Raises:
        As :func:`plan`.
    """
    anywhere = msgspec.structs.replace(target, num_blocks=source.num_blocks)
    return plan(source, anywhere, layers, [(block_id, block_id) for block_id in block_ids])


def shared_heads(source: KVLayout, target: KVLayout) -> range:
    """The model's KV heads that both ranks hold."""
    start = max(source.first_kv_head, target.first_kv_head)
    end = min(
        source.first_kv_head + source.num_kv_heads, target.first_kv_head + target.num_kv_heads
    )
    return range(start, max(start, end))


def _is_adjacent(run: ByteRun, after: ByteRun) -> bool:
    return (
        after.source_offset == run.source_offset + run.num_bytes
        and after.target_offset == run.target_offset + run.num_bytes
    )


def _join(runs: Iterable[ByteRun]) -> list[ByteRun]:
    """Join neighbours in the list that are adjacent on both sides."""
    joined: list[ByteRun] = []
    for run in runs:
        if joined and _is_adjacent(joined[-1], run):
            last = joined[-1]
            joined[-1] = ByteRun(
                last.source_offset, last.target_offset, last.num_bytes + run.num_bytes
            )
        else:
            joined.append(run)
    return joined


def _check_exists(
    source: KVLayout, target: KVLayout, layers: range, pairs: Sequence[tuple[int, int]]
) -> None:
    if layers.step != 1 or layers.start < 0 or layers.stop > source.num_layers:
        raise TransferError(f"layers {layers} are not of a model with {source.num_layers}")
    for side, blocks, num_blocks in (
        ("source", [pair[0] for pair in pairs], source.num_blocks),
        ("target", [pair[1] for pair in pairs], target.num_blocks),
    ):
        if min(blocks) < 0 or max(blocks) >= num_blocks:
            raise TransferError(f"a {side} block is not among the pool's {num_blocks}")
