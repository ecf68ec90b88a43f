"""The ring: messages go round, every rank attends with each that comes by, partials are merged.

One layer on one rank, the step ``i`` of N:
1. :func:`circulate` holds the message of rank ``r - i``; before anything is computed it posts the
   receive of the next one and the send of this one.
2. pass-KV: the message is keys and values, and this rank's queries attend to those they may see.
   pass-Q: the message is queries, which attend to this rank's keys; the partial result goes
   straight back to their owner.
3. The wait, and round again.

Either way a rank's partials are the same and are merged in fp32 in the same order, whatever the
timing: each run's own diagonal, what else the rank holds, then ranks r-1, r-2, ... So both forms
give the same bits. A message travels only as far as some rank sees a part of it, and empty pieces
do not exist.

Shapes, beside those of modeling.context: a KV message is [2, K, L, H] with L whole blocks, as
KVPool.gather lays it out; a partial is out_TNH then lse_TN, in one run of bytes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from modeling.kernels.attention import AttentionKernel, Piece
from ring_attention.comm import Message, Pending, RingComm
from ring_attention.partition import Partition, Shard, TokenRun, VisibleKeys

Shape = tuple[int, ...]


class RingBuffers:
    """Named memory that is used again by every layer and every chunk of a rank.

    Fresh large allocations cost more than the copies into them on CPU, and memory that NCCL still
    reads must not go back to an allocator.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._memory: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor, uninitialised, that holds until its name is taken again."""
        num_bytes = math.prod(shape) * dtype.itemsize
        memory = self._memory.get(name)
        if memory is None or memory.numel() < num_bytes:
            with torch.inference_mode(False):  # a tensor for both modes
                memory = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
            self._memory[name] = memory
        return memory[:num_bytes].view(dtype).view(shape)


@dataclass(frozen=True, slots=True)
class PlacedPiece:
    """One kernel call: a run's rows against a slice of a shard's keys."""

    run: TokenRun
    keys: slice
    piece: Piece


class AttentionTiles:
    """The kernel calls of a partition, with the tensors that they need; made once per chunk."""

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self._positions: dict[int, torch.Tensor] = {}
        self._pieces: dict[tuple[int, int], tuple[PlacedPiece, ...]] = {}

    def between(self, q_index: int, k_index: int) -> tuple[PlacedPiece, ...]:
        """What the tokens at one ring index compute with the keys at another."""
        key = (q_index, k_index)
        if key not in self._pieces:
            visible = self.partition.visible_keys(*key)
            self._pieces[key] = tuple(self._place(keys, k_index) for keys in visible)
        return self._pieces[key]

    def _place(self, visible: VisibleKeys, k_index: int) -> PlacedPiece:
        if k_index not in self._positions:
            self._positions[k_index] = key_positions(self.partition.shards[k_index])
        keys = slice(visible.first_key, visible.end_key)
        positions_S = self._positions[k_index][keys]
        piece = Piece(visible.causal, visible.run.start, positions_S, visible.window)
        return PlacedPiece(visible.run, keys, piece)


def key_positions(shard: Shard) -> torch.Tensor:
    """int64 [S], ascending, on CPU."""
    spans = [torch.arange(start, end, dtype=torch.int64) for start, end in shard.key_spans]
    return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class RingSchedule:
    """One lap of the ring's messages, which all of its ranks know beforehand."""

    ring: tuple[int, ...]  # cp ranks
    index: int  # this rank's, in the ring
    hops: tuple[int, ...]  # of each rank's message: how many ranks on it travels
    shapes: tuple[Shape, ...]  # of each rank's message
    dtype: torch.dtype


def circulate(
    comm: RingComm | None, schedule: RingSchedule, own: torch.Tensor | None, buffers: RingBuffers
) -> Iterator[tuple[int, torch.Tensor | None]]:
    """Send every rank's message round, and yield each that comes by, this rank's own first.

    While the caller works on a message, the next one arrives. A message is valid until the
    iteration goes on.

    Args:
        comm: None in a ring of one.
        schedule: the lap.
        own: this rank's message; None if no other rank needs one.
        buffers: for the messages that arrive.

    Yields:
        (step, the message of ring index ``index - step``), or None where none comes this far.

    Raises:
        PeerError: a neighbour did not do its part in time.
    """
    size = len(schedule.ring)
    left = schedule.ring[schedule.index - 1]
    right = schedule.ring[(schedule.index + 1) % size]
    held = own
    for step in range(size):
        origin = (schedule.index - step) % size  # of the message held
        following = (origin - 1) % size  # of the message that comes next
        sends: list[Message] = []
        receives: list[Message] = []
        if schedule.hops[origin] > step:
            assert held is not None
            sends.append((right, held))
        arriving = None
        if step + 1 < size and schedule.hops[following] > step:
            # Two buffers by turns: while this one fills, the other one is being sent and read.
            arriving = buffers.take(f"lap {step % 2}", schedule.shapes[following], schedule.dtype)
            receives.append((left, arriving))
        pending = _exchange(comm, sends, receives)
        yield step, held  # the caller computes here, while the messages move
        if pending is not None:
            pending.wait()
        held = arriving


def _exchange(
    comm: RingComm | None, sends: Sequence[Message], receives: Sequence[Message]
) -> Pending | None:
    if not sends and not receives:
        return None
    assert comm is not None, "a ring of several ranks needs a RingComm"
    return comm.exchange(sends, receives)


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The sizes of this rank's tensors, the same on every rank of its ring."""

    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    block_size: int
    dtype: torch.dtype  # of activations and of the KV pool

    def q_shape(self, num_tokens: int) -> Shape:
        return (num_tokens, self.num_heads, self.head_dim)

    def kv_shape(self, num_blocks: int) -> Shape:
        return (2, self.num_kv_heads, num_blocks * self.block_size, self.head_dim)


class RingLoop:
    """One rank's attention over the ring, for the layers of a chunk that share a window.

    Args:
        table: the chunk's pieces.
        cp_rank: this rank; it is in the ring.
        heads: sizes of q and of KV messages.
        comm: None in a ring of one.
        kernel: the device's attention.
        buffers: the rank's own, in use by no other loop at the same time.
    """

    def __init__(
        self,
        table: AttentionTiles,
        cp_rank: int,
        heads: HeadShape,
        comm: RingComm | None,
        kernel: AttentionKernel,
        buffers: RingBuffers,
    ) -> None:
        self.table = table
        self.heads = heads
        self.comm = comm
        self.kernel = kernel
        self.buffers = buffers
        partition = table.partition
        self.ring = partition.ring
        self.index = self.ring.index(cp_rank)
        shards = partition.shards
        self._kv_lap = RingSchedule(
            ring=self.ring,
            index=self.index,
            hops=tuple(partition.kv_hops(index) for index in range(partition.size)),
            shapes=tuple(heads.kv_shape(len(shard.block_ids)) for shard in shards),
            dtype=heads.dtype,
        )
        self._q_lap = RingSchedule(
            ring=self.ring,
            index=self.index,
            hops=tuple(partition.q_hops(index) for index in range(partition.size)),
            shapes=tuple(heads.q_shape(shard.num_tokens) for shard in shards),
            dtype=heads.dtype,
        )

    def pass_kv(
        self, q_TNH: torch.Tensor | None, kv_2KLH: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Keys and values travel. Every rank of the ring calls it, also without tokens or keys.

        Args:
            q_TNH: of this rank's tokens, last stride 1; None if it has none.
            kv_2KLH: the blocks that this rank holds; None if it has none.

        Returns:
            out_TNH in q's dtype, new; None without queries.

        Raises:
            PeerError: a rank did not do its part in time.
        """
        merged = _Merged.start(q_TNH, self.kernel, self.buffers)
        for step, message_2KLH in circulate(self.comm, self._kv_lap, kv_2KLH, self.buffers):
            for placed in self.table.between(self.index, (self.index - step) % len(self.ring)):
                assert q_TNH is not None and message_2KLH is not None and merged is not None
                merged.add(placed.run.rows, *self._attend(q_TNH, message_2KLH, placed))
        return None if merged is None or q_TNH is None else merged.out_like(q_TNH)

    def pass_q(
        self, q_TNH: torch.Tensor | None, kv_2KLH: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Queries travel and partial results come back; otherwise as :meth:`pass_kv`."""
        merged = _Merged.start(q_TNH, self.kernel, self.buffers)
        own = q_TNH
        # A slice of the fused projection is strided, and only contiguous tensors can be sent.
        if own is not None and not own.is_contiguous():
            own = self.buffers.take("own q", tuple(own.shape), own.dtype).copy_(own)
        returns: list[Pending | None] = []
        for step, visitor_TNH in circulate(self.comm, self._q_lap, own, self.buffers):
            placed = self.table.between((self.index - step) % len(self.ring), self.index)
            if step:
                returns.append(self._post_return(step, placed, visitor_TNH, kv_2KLH))
                continue
            for own_piece in placed:
                assert q_TNH is not None and kv_2KLH is not None and merged is not None
                merged.add(own_piece.run.rows, *self._attend(q_TNH, kv_2KLH, own_piece))
        # The query sent at step i is answered by rank r + i, so the last step's answer is that of
        # rank r - 1. Merging backwards keeps the order of pass-KV.
        for step in range(len(self.ring) - 1, 0, -1):
            pending = returns[step - 1]
            if pending is not None:
                pending.wait()
            if merged is not None:
                self._merge_return(step, merged)
        return None if merged is None or q_TNH is None else merged.out_like(q_TNH)

    def _attend(
        self, q_TNH: torch.Tensor, kv_2KLH: torch.Tensor, placed: PlacedPiece
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k_KSH, v_KSH = kv_2KLH[:, :, placed.keys].unbind(0)
        return self.kernel.attend(
            q_TNH[placed.run.rows], k_KSH.transpose(0, 1), v_KSH.transpose(0, 1), placed.piece
        )

    def _post_return(
        self,
        step: int,
        placed: Sequence[PlacedPiece],
        visitor_TNH: torch.Tensor | None,
        kv_2KLH: torch.Tensor | None,
    ) -> Pending | None:
        """Send this step's visitor its partial, and expect that of the rank our queries visit."""
        sends: list[Message] = []
        receives: list[Message] = []
        if placed:
            assert visitor_TNH is not None and kv_2KLH is not None
            message, out_TNH, lse_TN = self._partial(f"sent {step}", placed)
            for rows, piece in _stack(placed):
                out, lse = self._attend(visitor_TNH, kv_2KLH, piece)
                out_TNH[rows].copy_(out)
                lse_TN[rows].copy_(lse)
            sends.append((self.ring[(self.index - step) % len(self.ring)], message))
        helper = (self.index + step) % len(self.ring)
        expected = self.table.between(self.index, helper)
        if expected:
            receives.append((self.ring[helper], self._partial(f"returned {step}", expected)[0]))
        return _exchange(self.comm, sends, receives)

    def _merge_return(self, step: int, merged: "_Merged") -> None:
        expected = self.table.between(self.index, (self.index + step) % len(self.ring))
        if not expected:
            return
        _, out_TNH, lse_TN = self._partial(f"returned {step}", expected)
        for rows, piece in _stack(expected):
            merged.add(piece.run.rows, out_TNH[rows], lse_TN[rows])

    def _partial(
        self, name: str, placed: Sequence[PlacedPiece]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A returning message: (its bytes, its out_TNH, its lse_TN), of the pieces' rows alone."""
        num_rows = sum(piece.run.num_tokens for piece in placed)
        q_shape = self.heads.q_shape(num_rows)
        out_bytes = math.prod(q_shape) * self.heads.dtype.itemsize
        lse_bytes = num_rows * self.heads.num_heads * torch.float32.itemsize
        message = self.buffers.take(name, (out_bytes + lse_bytes,), torch.uint8)
        out_TNH = message[:out_bytes].view(self.heads.dtype).view(q_shape)
        return message, out_TNH, message[out_bytes:].view(torch.float32).view(q_shape[:2])


def _stack(placed: Sequence[PlacedPiece]) -> Iterator[tuple[slice, PlacedPiece]]:
    """Each piece with its rows in a message that holds the pieces' rows one after another."""
    first = 0
    for piece in placed:
        yield slice(first, first + piece.run.num_tokens), piece
        first += piece.run.num_tokens


class _Merged:
    """A rank's accumulator: partials are merged into it in the order in which they are added."""

    def __init__(
        self, kernel: AttentionKernel, out_TNH: torch.Tensor, lse_TN: torch.Tensor
    ) -> None:
        self._kernel = kernel
        self._out_TNH = out_TNH  # fp32
        self._lse_TN = lse_TN
        self._started: set[int] = set()

    @classmethod
    def start(
        cls, q_TNH: torch.Tensor | None, kernel: AttentionKernel, buffers: RingBuffers
    ) -> "_Merged | None":
        """For these queries; None for a rank that has none."""
        if q_TNH is None:
            return None
        out_TNH = buffers.take("out", tuple(q_TNH.shape), torch.float32)
        return cls(kernel, out_TNH, buffers.take("lse", tuple(q_TNH.shape[:2]), torch.float32))

    def add(self, rows: slice, out_TNH: torch.Tensor, lse_TN: torch.Tensor) -> None:
        """Merge a partial of one run. The first one, its diagonal, is copied: it has every row."""
        if rows.start in self._started:
            self._kernel.merge_(self._out_TNH[rows], self._lse_TN[rows], out_TNH, lse_TN)
            return
        self._started.add(rows.start)
        self._out_TNH[rows].copy_(out_TNH)
        self._lse_TN[rows].copy_(lse_TN)

    def out_like(self, q_TNH: torch.Tensor) -> torch.Tensor:
        return torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device).copy_(self._out_TNH)
