"""Attention of many bfloat16 queries on CPUs with AVX512-BF16: cpp/attention.cpp, called.

torch's flash op multiplies bf16 in fp32 on CPUs without AMX; this one is for those that have at
least the instruction for pairs of bf16.
"""

import ctypes
from pathlib import Path

import torch

from modeling.kernels.native_build import load_native

MIN_ROWS = 16  # queries times heads that share a key: for fewer, packing the keys is not worth it
_LANES = 16  # head_dim is a multiple of them


class NativeAttention:
    """The compiled kernel, where there is one.

    Args:
        cache_dir: of the compiled library; None is the user's.
    """

    def __init__(self, cache_dir: Path | None = None) -> None:
        library = load_native("attention", cache_dir)
        has_instruction = library is not None and bool(library.has_fast_bfloat16())
        self._library = library if has_instruction else None
        if self._library is not None:
            self._library.attend.argtypes = (ctypes.POINTER(_AttentionArgs),)

    @property
    def is_usable(self) -> bool:
        """Whether it could be compiled and this CPU has the instruction."""
        return self._library is not None

    def takes(self, q_TNH: torch.Tensor, k_SKH: torch.Tensor) -> bool:
        """Whether this is the faster kernel for a piece of these shapes."""
        num_queries, num_heads, head_dim = q_TNH.shape
        num_rows = num_queries * num_heads // k_SKH.shape[1]
        is_fit = q_TNH.dtype == torch.bfloat16 and head_dim % _LANES == 0
        return self.is_usable and is_fit and num_rows >= MIN_ROWS

    def attend(
        self, q_TNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, *, is_causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out_TNH, lse_TN) of pieces that :meth:`takes`; T == S if causal. Last stride is 1."""
        assert self._library is not None and q_TNH.dtype == k_SKH.dtype == v_SKH.dtype
        assert q_TNH.stride(2) == k_SKH.stride(2) == v_SKH.stride(2) == 1
        out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype)
        lse_TN = torch.empty(q_TNH.shape[:2], dtype=torch.float32)
        args = _AttentionArgs(
            q=q_TNH.data_ptr(),
            k=k_SKH.data_ptr(),
            v=v_SKH.data_ptr(),
            out=out_TNH.data_ptr(),
            lse=lse_TN.data_ptr(),
            num_queries=q_TNH.shape[0],
            num_keys=k_SKH.shape[0],
            num_heads=q_TNH.shape[1],
            num_kv_heads=k_SKH.shape[1],
            head_dim=q_TNH.shape[2],
            q_stride=q_TNH.stride(0),
            q_head_stride=q_TNH.stride(1),
            k_stride=k_SKH.stride(0),
            k_head_stride=k_SKH.stride(1),
            v_stride=v_SKH.stride(0),
            v_head_stride=v_SKH.stride(1),
            is_causal=is_causal,
            num_threads=torch.get_num_threads(),
            scale=q_TNH.shape[2] ** -0.5,
        )
        code = self._library.attend(ctypes.byref(args))
        assert code == 0, "these sizes are for another kernel"
        return out_TNH, lse_TN


class _AttentionArgs(ctypes.Structure):
    """Mirrors the struct of cpp/attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "lse")),
        *((name, ctypes.c_int64) for name in ("num_queries", "num_keys")),
        *((name, ctypes.c_int64) for name in ("num_heads", "num_kv_heads", "head_dim")),
        *((name, ctypes.c_int64) for name in ("q_stride", "q_head_stride")),
        *((name, ctypes.c_int64) for name in ("k_stride", "k_head_stride")),
        *((name, ctypes.c_int64) for name in ("v_stride", "v_head_stride")),
        *((name, ctypes.c_int64) for name in ("is_causal", "num_threads")),
        ("scale", ctypes.c_double),
    )
