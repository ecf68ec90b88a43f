"""The plan against a dense copy: every CP x TP on the left, every TP on the right, and back."""

import itertools
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from kvtransfer.plan import ByteRun, plan, source_runs
from protocol.errors import TransferError, VersionError
from protocol.kv import KVLayout
from tests.sizes import some_of

Pool = npt.NDArray[np.int32]
Owners = list[tuple[int, int]]  # of each logical block: (cp rank, block id there)


@dataclass
class Side:
    """The ranks of one pool: ``pools[cp_rank][tp_rank]``, each a tensor as KVLayout orders it."""

    layouts: list[KVLayout]
    pools: list[list[Pool]]


def _side(num_layers: int, num_blocks: int, heads: int, cp_size: int, tp_size: int) -> Side:
    layouts = [
        KVLayout(num_layers, num_blocks, heads, tp_rank, tp_size, 1, 1, "float32")
        for tp_rank in range(tp_size)
    ]
    pools = [[np.full(lay.shape, -1, np.int32) for lay in layouts] for _ in range(cp_size)]
    return Side(layouts, pools)


def _move(source: Side, target: Side, layers: range, blocks: Owners, to: Owners) -> None:
    for cp_rank, source_pools in enumerate(source.pools):
        for to_cp_rank, target_pools in enumerate(target.pools):
            pairs = [
                (block, to_block)
                for (owner, block), (reader, to_block) in zip(blocks, to, strict=True)
                if (owner, reader) == (cp_rank, to_cp_rank)
            ]
            for source_pool, source_layout in zip(source_pools, source.layouts, strict=True):
                for target_pool, target_layout in zip(target_pools, target.layouts, strict=True):
                    runs = plan(source_layout, target_layout, layers, pairs)
                    _apply(runs, source_pool, target_pool)


def _apply(runs: list[ByteRun], source: Pool, target: Pool) -> None:
    read, written = source.view(np.uint8).ravel(), target.view(np.uint8).ravel()
    for run in runs:
        piece = read[run.source_offset : run.source_offset + run.num_bytes]
        assert len(piece) == run.num_bytes
        written[run.target_offset : run.target_offset + run.num_bytes] = piece


def _dense(side: Side, blocks: Owners) -> Pool:
    """[L, num_logical, total heads, 2]: what the ranks hold, in logical order."""
    of_blocks = [
        np.concatenate([pool[:, block_id] for pool in side.pools[cp_rank]], axis=1)
        for cp_rank, block_id in blocks
    ]
    return np.stack(of_blocks, axis=1).reshape(side.layouts[0].num_layers, len(blocks), -1, 2)


@st.composite
def _hand_offs(draw: st.DrawFn) -> tuple[Side, Side, range, Owners, Owners]:
    heads = draw(st.sampled_from([1, 2, 4, 6, 8]))
    degrees = st.sampled_from([tp for tp in (1, 2, 3, 4, 6, 8) if heads % tp == 0])
    num_layers = draw(st.integers(1, 4))
    num_logical = draw(st.integers(1, 10))
    sides, owners = [], []
    for cp_size in (draw(st.integers(1, 4)), 1):
        num_blocks = num_logical + draw(st.integers(0, 3))
        sides.append(_side(num_layers, num_blocks, heads, cp_size, draw(degrees)))
        ids = draw(st.permutations(range(num_blocks)) | st.just(list(range(num_blocks))))
        ranks = draw(st.lists(st.integers(0, cp_size - 1), min_size=num_logical, max_size=20))
        owners.append([(ranks[i], ids[i]) for i in range(num_logical)])
    start = draw(st.integers(0, num_layers - 1))
    layers = range(start, draw(st.integers(start, num_layers)))
    return sides[0], sides[1], layers, owners[0], owners[1]


@settings(max_examples=some_of(300))
@given(_hand_offs())
def test_moves_exactly_what_a_dense_copy_moves(
    hand_off: tuple[Side, Side, range, Owners, Owners],
) -> None:
    prefill, decode, layers, blocks, to = hand_off
    count = 0
    for cp_pools in prefill.pools:
        for pool in cp_pools:
            pool[...] = np.arange(count, count + pool.size).reshape(pool.shape)
            count += pool.size
    _move(prefill, decode, layers, blocks, to)
    expected = np.full_like(_dense(prefill, blocks), -1)
    expected[list(layers)] = _dense(prefill, blocks)[list(layers)]
    assert np.array_equal(_dense(decode, to), expected)
    untouched = sum(int((pool == -1).sum()) for pool in decode.pools[0])
    assert untouched == sum(pool.size for pool in decode.pools[0]) - int((expected != -1).sum())

    # And back, into a prefill pool that is new.
    back = Side(prefill.layouts, [[np.full_like(p, -1) for p in cp] for cp in prefill.pools])
    _move(decode, back, layers, to, blocks)
    assert np.array_equal(_dense(back, blocks), expected)


@settings(deadline=None)
@given(_hand_offs(), st.randoms(use_true_random=False))
def test_order_joins_and_who_meets_whom(
    hand_off: tuple[Side, Side, range, Owners, Owners],
    random: object,
) -> None:
    prefill, decode, layers, blocks, to = hand_off
    pairs = [(block, to_block) for (owner, block), (_, to_block) in zip(blocks, to, strict=True)]
    pairs = list({source: (source, target) for source, target in pairs}.values())
    shuffled = list(pairs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for source in prefill.layouts:
        for target in decode.layouts:
            runs = plan(source, target, layers, pairs)
            assert runs == plan(source, target, layers, shuffled)
            meets = bool(set(_heads(source)) & set(_heads(target)))
            assert bool(runs) == (meets and len(layers) > 0)
            assert not any(
                one.source_offset + one.num_bytes == other.source_offset
                and one.target_offset + one.num_bytes == other.target_offset
                for one, other in itertools.pairwise(runs)
            )
            alone = source_runs(source, target, layers, [block for block, _ in pairs])
            assert _bytes_in_order(runs) == _bytes_in_order(alone)


def _heads(layout: KVLayout) -> range:
    return range(layout.first_kv_head, layout.first_kv_head + layout.num_kv_heads)


def _bytes_in_order(runs: list[ByteRun]) -> list[int]:
    return [run.source_offset + i for run in runs for i in range(run.num_bytes)]


def test_descriptors() -> None:
    whole = KVLayout(3, 10, 4, 0, 1, 32, 64, "bfloat16")
    half = KVLayout(3, 20, 4, 1, 2, 32, 64, "bfloat16")
    pairs = [(i, i + 2) for i in range(8)]
    assert len(plan(whole, whole, range(3), pairs)) == 3  # equal heads: a run of blocks is one
    assert len(plan(whole, half, range(3), pairs)) == 24  # split heads: one per layer and block
    everything = [(i, i) for i in range(10)]
    assert plan(whole, whole, range(3), everything) == [ByteRun(0, 0, whole.num_bytes)]
    assert plan(whole, whole, range(3), []) == []


def test_refuses_what_does_not_exist() -> None:
    layout = KVLayout(2, 4, 2, 0, 1, 8, 8, "float32")
    for layers, pair in (
        (range(2), (4, 0)),
        (range(2), (0, 4)),
        (range(2), (-1, 0)),
        (range(2), (0, -1)),
        (range(1, 3), (0, 0)),
        (range(-1, 1), (0, 0)),
    ):
        with pytest.raises(TransferError):
            plan(layout, layout, layers, [(1, 1), pair])
    with pytest.raises(VersionError):
        plan(layout, KVLayout(2, 4, 2, 0, 1, 16, 8, "float32"), range(2), [(0, 0)])
