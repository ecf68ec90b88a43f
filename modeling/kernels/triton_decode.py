# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: ANN001, ANN202, PLR0913, PLR0915 - Triton gives annotations and arguments a meaning of its own
"""Paged decode on GPUs: split-KV attention in Triton (Dao et al., Flash-Decoding, 2023).

1. One program per (sequence, KV head, split) attends all query heads of the group to SPLIT keys.
2. One program per (sequence, query head) merges the splits in order of position.

The size of a split is fixed, not their number, and an empty split changes no bit of the result: a
sequence's output does not depend on the rest of the batch. Nothing here needs the lengths on the
host, so a CUDA graph may replay it.
"""

import torch
import triton
import triton.language as tl

SPLIT = 512  # keys
TILE = 64
NO_WINDOW = 2**30


@triton.jit
def _attend_split(
    q,
    pool,
    tables,
    lens,
    part_out,
    part_lse,
    scale,
    window,
    q_seq_stride,
    q_head_stride,
    table_stride,
    block_stride,
    head_stride,
    value_offset,
    num_heads,
    num_splits,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lens + seq)
    start = tl.maximum(split * SPLIT, length - window)
    end = tl.minimum(split * SPLIT + SPLIT, length)

    group = tl.arange(0, GROUP_PAD)
    dim = tl.arange(0, HEAD_PAD)
    head = kv_head * GROUP + group
    is_head = (group < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    q_ptr = q + seq * q_seq_stride + head[:, None] * q_head_stride + dim[None, :]
    q_GH = tl.load(q_ptr, mask=is_head, other=0.0)

    top_G = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    sum_G = tl.zeros([GROUP_PAD], tl.float32)
    acc_GH = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
    # Tiles lie at multiples of TILE wherever the window starts; each has a key that is seen.
    for tile in range(start // TILE * TILE, end, TILE):
        position = tile + tl.arange(0, TILE)
        seen = (position >= start) & (position < end)
        block = tl.load(tables + seq * table_stride + position // BLOCK_SIZE, mask=seen, other=0)
        row = block.to(tl.int64) * block_stride + kv_head * head_stride
        row += position % BLOCK_SIZE * HEAD_DIM
        k_mask = seen[None, :] & (dim < HEAD_DIM)[:, None]
        k_HS = tl.load(pool + row[None, :] + dim[:, None], mask=k_mask, other=0.0)
        scores_GS = tl.dot(q_GH, k_HS, input_precision="ieee") * scale
        scores_GS = tl.where(seen[None, :], scores_GS, float("-inf"))
        new_top_G = tl.maximum(top_G, tl.max(scores_GS, 1))
        weights_GS = tl.exp(scores_GS - new_top_G[:, None])
        kept_G = tl.exp(top_G - new_top_G)
        sum_G = sum_G * kept_G + tl.sum(weights_GS, 1)
        v_ptr = pool + value_offset + row[:, None] + dim[None, :]
        v_mask = seen[:, None] & (dim < HEAD_DIM)[None, :]
        v_SH = tl.load(v_ptr, mask=v_mask, other=0.0)
        part_GH = tl.dot(weights_GS.to(v_SH.dtype), v_SH, input_precision="ieee")
        acc_GH = acc_GH * kept_G[:, None] + part_GH
        top_G = new_top_G

    is_empty = sum_G == 0.0
    divisor_G = tl.where(is_empty, 1.0, sum_G)
    lse_G = tl.where(is_empty, float("-inf"), top_G + tl.log(divisor_G))
    index = (seq * num_heads + head) * num_splits + split
    tl.store(part_lse + index, lse_G, mask=group < GROUP)
    out_ptr = part_out + index[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out_ptr, acc_GH / divisor_G[:, None], mask=is_head)


@triton.jit
def _merge_splits(
    part_out,
    part_lse,
    out,
    lse,
    num_splits,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, HEAD_PAD)
    top = float("-inf")
    total = 0.0
    acc_H = tl.zeros([HEAD_PAD], tl.float32)
    for split in range(num_splits):
        index = row * num_splits + split
        part = tl.load(part_lse + index)
        part_ptr = part_out + index * HEAD_DIM + dim
        part_H = tl.load(part_ptr, mask=dim < HEAD_DIM, other=0.0)
        new_top = tl.maximum(top, part)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        kept = tl.exp(top - base)
        added = tl.exp(part - base)
        total = total * kept + added
        acc_H = acc_H * kept + part_H * added
        top = new_top
    tl.store(lse + row, top + tl.log(total))
    tl.store(out + row * HEAD_DIM + dim, acc_H / total, mask=dim < HEAD_DIM)


def paged_decode(
    q_BNH: torch.Tensor,
    pool: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :meth:`AttentionKernel.paged_decode` of attention.py; everything on one GPU."""
    num_seqs, num_heads, head_dim = q_BNH.shape
    num_kv_heads = pool.shape[1]
    block_size = pool.shape[3]
    group = num_heads // num_kv_heads
    num_splits = triton.cdiv(block_tables.shape[1] * block_size, SPLIT)
    head_pad = max(16, triton.next_power_of_2(head_dim))  # tl.dot wants 16 at least
    shape = (num_seqs, num_heads, num_splits)
    part_out = torch.empty((*shape, head_dim), dtype=torch.float32, device=q_BNH.device)
    part_lse = torch.empty(shape, dtype=torch.float32, device=q_BNH.device)
    out_BNH = torch.empty(q_BNH.shape, dtype=q_BNH.dtype, device=q_BNH.device)
    lse_BN = torch.empty((num_seqs, num_heads), dtype=torch.float32, device=q_BNH.device)
    _attend_split[(num_seqs, num_kv_heads, num_splits)](
        q_BNH,
        pool,
        block_tables,
        context_lens,
        part_out,
        part_lse,
        head_dim**-0.5,
        window or NO_WINDOW,
        q_BNH.stride(0),
        q_BNH.stride(1),
        block_tables.stride(0),
        pool.stride(0),
        pool.stride(1),
        pool.stride(2),
        num_heads,
        num_splits,
        GROUP=group,
        GROUP_PAD=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        HEAD_PAD=head_pad,
        BLOCK_SIZE=block_size,
        SPLIT=SPLIT,
        TILE=TILE,
    )
    _merge_splits[(num_seqs * num_heads,)](
        part_out, part_lse, out_BNH, lse_BN, num_splits, HEAD_DIM=head_dim, HEAD_PAD=head_pad
    )
    return out_BNH, lse_BN
