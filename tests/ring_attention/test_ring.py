"""The ring computes what dense attention computes, whoever holds what."""

from dataclasses import replace

import pytest
import torch

from protocol.errors import PeerError
from tests.ring_attention.local_ring import LocalRing
from tests.ring_attention.ring_cases import (
    DenseKernel,
    PositionKernel,
    Setup,
    attend_on_threads,
    relative_error,
)

FORMS = [False, True]
SIZES = [1, 2, 3, 4, 8]

# (prefix blocks, tokens of the chunk): even, uneven, fewer blocks than 2N, one token, long prefix
LENGTHS = [(0, 128), (0, 101), (0, 13), (0, 1), (5, 64), (30, 37), (17, 1), (1, 5)]


@pytest.mark.parametrize("pass_q", FORMS, ids=["pass_kv", "pass_q"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_equals_dense_attention(size: int, lengths: tuple[int, int], pass_q: bool) -> None:
    case = Setup(
        ring=tuple(range(size)),
        num_prefix_blocks=lengths[0],
        num_tokens=lengths[1],
        pass_q=pass_q,
        seed=size,
    ).build()
    assert relative_error(attend_on_threads(case, DenseKernel()), case.expected_attention()) <= 1e-6


@pytest.mark.parametrize("pass_q", FORMS, ids=["pass_kv", "pass_q"])
@pytest.mark.parametrize("window", [1, 3, 16, 50, 400])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_sliding_window(size: int, window: int, pass_q: bool) -> None:
    case = Setup(
        ring=tuple(range(size)),
        num_prefix_blocks=12,
        num_tokens=203,
        window=window,
        pass_q=pass_q,
        seed=window,
    ).build()
    assert relative_error(attend_on_threads(case, DenseKernel()), case.expected_attention()) <= 1e-6


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1), (6, 2)], ids=str)
def test_grouped_heads(heads: tuple[int, int]) -> None:
    case = Setup(
        num_prefix_blocks=3, num_tokens=50, num_heads=heads[0], num_kv_heads=heads[1]
    ).build()
    assert relative_error(attend_on_threads(case, DenseKernel()), case.expected_attention()) <= 1e-6


def test_a_ring_of_some_ranks_in_any_order() -> None:
    case = Setup(ring=(5, 2, 7), num_prefix_blocks=9, num_tokens=70).build()
    assert relative_error(attend_on_threads(case, DenseKernel()), case.expected_attention()) <= 1e-6


@pytest.mark.parametrize("pass_q", FORMS, ids=["pass_kv", "pass_q"])
@pytest.mark.parametrize("seed", range(12))
def test_positions_are_exact(seed: int, pass_q: bool) -> None:
    case = Setup(
        ring=tuple(range(1 + seed % 4)),
        num_prefix_blocks=seed * 3,
        num_tokens=1 + seed * 11,
        window=(None, 20)[seed % 2],
        pass_q=pass_q,
        integers=True,
        seed=seed,
    ).build()
    assert torch.equal(attend_on_threads(case, PositionKernel()), case.expected_position_sum())


@pytest.mark.parametrize("pass_q", FORMS, ids=["pass_kv", "pass_q"])
@pytest.mark.parametrize("blocks", [(0, 1), (3, 8), (8, 11), (12, 13)], ids=str)
def test_two_swapped_blocks_are_noticed(blocks: tuple[int, int], pass_q: bool) -> None:
    """The check of the checks: of 12 prefix blocks, or one of them and one of the chunk's."""
    setup = Setup(num_prefix_blocks=14, num_tokens=40, pass_q=pass_q, integers=True)
    case = setup.build()
    case.swap_blocks(*blocks)
    out = attend_on_threads(case, PositionKernel())
    assert not torch.equal(out, case.expected_position_sum())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_both_forms_give_the_same_bits(size: int, dtype: str) -> None:
    setup = Setup(
        ring=tuple(range(size)), num_prefix_blocks=11, num_tokens=90, dtype=dtype, window=77
    )
    pass_kv = attend_on_threads(setup.build(), DenseKernel())
    pass_q = attend_on_threads(replace(setup, pass_q=True).build(), DenseKernel())
    assert torch.equal(pass_kv, pass_q)


def test_a_missing_peer_ends_the_wait() -> None:
    case = Setup(num_tokens=64).build()
    with pytest.raises(PeerError):
        case.attend(0, LocalRing(timeout_s=0.05).comm(0), DenseKernel())
