"""One forward pass over sequences whose KV is paged in this rank's own pool: decode, and prefill
without a ring.

1. The runner describes the batch by one ``PagedSequence`` each, in the order of its tokens.
2. Built once per step: where every token's K and V go, and one block table for all sequences that
   compute a single token.
3. Each layer: write the new K and V; one ``paged_decode`` for the single tokens; for each longer
   sequence attend to its earlier tokens, to its own, and merge the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvcache.pool import KVPool
from modeling.checkpoint.config import ModelConfig
from modeling.context import AttentionContext
from modeling.kernels.attention import AttentionKernel, Piece


@dataclass(frozen=True, slots=True)
class PagedSequence:
    """``num_tokens`` consecutive tokens of one sequence, from position ``start`` on."""

    start: int
    num_tokens: int
    block_ids: torch.Tensor  # int32 on CPU, in order of position, at least up to the last token


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A sequence that computes several tokens: rows ``[first, last)`` of the batch."""

    first: int
    last: int
    start: int
    block_ids: list[int]


class PagedAttention(AttentionContext):
    """The context of one step.

    Args:
        pool: this rank's KV.
        kernel: the model's.
        config: of the whole model.
        sequences: at least one; their tokens lie behind one another in the batch.
    """

    def __init__(
        self,
        pool: KVPool,
        kernel: AttentionKernel,
        config: ModelConfig,
        sequences: Sequence[PagedSequence],
    ) -> None:
        self._pool = pool
        self._kernel = kernel
        self._windows = config.layer_windows
        self._block_size = pool.layout.block_size
        tables = [sequence.block_ids.numpy() for sequence in sequences]
        starts = np.array([sequence.start for sequence in sequences], dtype=np.int64)
        counts = np.array([sequence.num_tokens for sequence in sequences], dtype=np.int64)
        ends = np.cumsum(counts)
        self._num_tokens = int(ends[-1])
        is_single = counts == 1
        self._chunks = [
            _Chunk(int(ends[i] - counts[i]), int(ends[i]), int(starts[i]), tables[i].tolist())
            for i in np.flatnonzero(~is_single)
        ]
        singles = np.flatnonzero(is_single)
        self._tables = self._lens = None
        if len(singles):
            self._tables = _pad([tables[i] for i in singles]).to(pool.device)
            self._lens = torch.from_numpy((starts[singles] + 1).astype(np.int32)).to(pool.device)
        self._single_rows = _rows(ends[singles] - 1, pool.device)
        slots = _slots(tables, starts, counts, self._block_size)
        self._write_rows = pool.rows(torch.from_numpy(slots).to(pool.device))

    def attend(
        self, layer: int, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor
    ) -> torch.Tensor:
        assert q_TNH.shape[0] == self._num_tokens, "the batch is not the one described"
        self._pool.write_rows(layer, self._write_rows, k_TKH, v_TKH)
        window = self._windows[layer]
        if not self._chunks:
            return self._decode(layer, q_TNH, window)
        out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
        if self._tables is not None:
            out_TNH[self._single_rows] = self._decode(layer, q_TNH[self._single_rows], window)
        for chunk in self._chunks:
            rows = slice(chunk.first, chunk.last)
            out_TNH[rows] = self._attend_chunk(layer, chunk, q_TNH[rows], k_TKH[rows], v_TKH[rows])
        return out_TNH

    def _decode(self, layer: int, q_BNH: torch.Tensor, window: int | None) -> torch.Tensor:
        assert self._tables is not None and self._lens is not None
        out_BNH, _ = self._kernel.paged_decode(
            q_BNH, self._pool.layer(layer), self._tables, self._lens, window=window
        )
        return out_BNH

    def _attend_chunk(
        self,
        layer: int,
        chunk: _Chunk,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
    ) -> torch.Tensor:
        window = self._windows[layer]
        own = Piece(True, chunk.start, torch.arange(chunk.start, chunk.start + len(q_TNH)), window)
        out_TNH, lse_TN = self._kernel.attend(q_TNH, k_TKH, v_TKH, own)
        # The prefix that the first query still sees, from a block's start on.
        seen = 0 if window is None else max(0, chunk.start - window + 1)
        first_block = seen // self._block_size
        first = first_block * self._block_size
        if first >= chunk.start or seen >= chunk.start:
            return out_TNH
        k_SKH, v_SKH = self._pool.gather(layer, chunk.block_ids[first_block:], chunk.start - first)
        prefix = Piece(False, chunk.start, torch.arange(first, chunk.start), window)
        other_out_TNH, other_lse_TN = self._kernel.attend(q_TNH, k_SKH, v_SKH, prefix)
        total_TNH = out_TNH.float()
        self._kernel.merge_(total_TNH, lse_TN, other_out_TNH, other_lse_TN)
        return total_TNH.to(q_TNH.dtype)


def _pad(tables: Sequence[np.ndarray]) -> torch.Tensor:
    """Block tables of different lengths as one int32 [B, max_blocks]; the rest is block 0."""
    padded = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return torch.from_numpy(padded)


def _rows(rows: np.ndarray, device: torch.device) -> slice | torch.Tensor:
    """Ascending row numbers, as a slice (a view, no copy) where they are adjacent."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows).to(device)


def _slots(
    tables: Sequence[np.ndarray], starts: np.ndarray, counts: np.ndarray, block_size: int
) -> np.ndarray:
    """``block_id * block_size + offset`` of every token of the batch, int64 [T]."""
    parts = []
    for table, start, count in zip(tables, starts.tolist(), counts.tolist(), strict=True):
        if count == 1:  # the common case, without the cost of three small arrays
            block_id = int(table[start // block_size])
            parts.append(block_id * block_size + start % block_size)
            continue
        positions = np.arange(start, start + count)
        slots = table[positions // block_size].astype(np.int64) * block_size
        parts.extend((slots + positions % block_size).tolist())
    return np.array(parts, dtype=np.int64)
