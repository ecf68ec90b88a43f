"""The real CPU kernel on the ring: how much the ring adds to the kernel's own rounding."""

import pytest
import torch

from modeling.kernels.attention import Piece
from modeling.kernels.cpu_attention import CpuKernel
from tests.ring_attention.ring_cases import RingCase, Setup, attend_on_threads, relative_error

KERNEL = CpuKernel(native=False)


def one_shot(case: RingCase) -> torch.Tensor:
    piece = Piece(True, 0, case.positions_S)
    return KERNEL.attend(case.q_SNH, case.k_SKH, case.v_SKH, piece)[0]


@pytest.mark.parametrize("pass_q", [False, True], ids=["pass_kv", "pass_q"])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("prefix", [0, 7])
def test_float32_is_as_good_as_one_call(size: int, prefix: int, pass_q: bool) -> None:
    case = Setup(
        ring=tuple(range(size)),
        num_prefix_blocks=prefix,
        num_tokens=500,
        block_size=16,
        num_heads=8,
        head_dim=64,
        pass_q=pass_q,
    ).build()
    assert relative_error(attend_on_threads(case, KERNEL), case.expected_attention()) <= 1e-6


@pytest.mark.parametrize("window", [5, 100, 300])
def test_float32_with_a_window(window: int) -> None:
    case = Setup(num_prefix_blocks=20, num_tokens=400, block_size=16, window=window).build()
    assert relative_error(attend_on_threads(case, KERNEL), case.expected_attention()) <= 1e-6


@pytest.mark.parametrize("size", [2, 4, 8])
def test_bfloat16_adds_little_to_the_kernels_own_error(size: int) -> None:
    case = Setup(
        ring=tuple(range(size)),
        num_tokens=1024,
        block_size=16,
        num_heads=8,
        head_dim=64,
        dtype="bfloat16",
    ).build()
    expected = case.expected_attention()
    out = attend_on_threads(case, KERNEL)
    assert relative_error(out, expected) <= 1.3 * relative_error(one_shot(case), expected)
    ulp = 2.0 ** (torch.floor(torch.log2(expected.abs().amax(dim=-1, keepdim=True))) - 7)
    assert ((out.double() - expected).abs() <= 2 * ulp).all()
