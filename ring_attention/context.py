"""Attention of one chunk on one rank of a ring: what the model sees of context parallelism.

1. The runner makes a :class:`RingAttention` from the plan's ChunkWork. It knows which tokens this
   rank computes (``input_ids_T`` at ``positions_T``) and which cached blocks it contributes.
2. The model runs over those tokens. At each layer ``attend`` writes their K and V into this rank's
   own blocks, lays out all that the rank holds of the sequence as one message, and goes round the
   ring. A rank without tokens of a short chunk takes part with ``attend_empty``.
3. ``layer_done`` tells the runner that the layer's blocks are final and may be announced.

:func:`forward_chunk` does 2 and 3 for either kind of rank.
"""

from collections.abc import Callable

import torch

from kvcache.pool import KVPool
from modeling.checkpoint.config import ModelConfig
from modeling.context import AttentionContext
from modeling.kernels.attention import AttentionKernel
from modeling.model import Model
from protocol.plans import ChunkWork
from ring_attention.comm import RingComm
from ring_attention.partition import Partition, Shard
from ring_attention.ring import AttentionTiles, HeadShape, RingBuffers, RingLoop


class RingAttention(AttentionContext):
    """One rank's context for one chunk. Every rank of the chunk's ring has one and runs it.

    Args:
        work: the chunk; its blocks are allocated in ``pool`` where this rank owns them.
        cp_rank: this rank; it is in ``work.ring``.
        pool: this rank's KV.
        comm: to the ring's other ranks; None in a ring of one.
        kernel: the device's attention.
        config: of the model that runs.
        on_layer_done: called with each layer's index once its KV is final; must not block.
        buffers: memory to use again from chunk to chunk; by default, of this chunk's own.

    Attributes:
        input_ids_T, positions_T: int64, of this rank's tokens of the chunk, ascending; may be
            empty, and then :meth:`attend_empty` takes the place of :meth:`attend`.
        last_token_index: among them, of the chunk's last token; None if another rank computes it.
    """

    def __init__(
        self,
        work: ChunkWork,
        cp_rank: int,
        pool: KVPool,
        comm: RingComm | None,
        kernel: AttentionKernel,
        config: ModelConfig,
        on_layer_done: Callable[[int], None] | None = None,
        *,
        buffers: RingBuffers | None = None,
    ) -> None:
        self.work = work
        self.cp_rank = cp_rank
        self.pool = pool
        self._comm = comm
        self._kernel = kernel
        self._config = config
        self._on_layer_done = on_layer_done
        self._buffers = RingBuffers(pool.device) if buffers is None else buffers
        layout = pool.layout
        self._heads = HeadShape(
            num_heads=config.num_heads // layout.tp_size,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            block_size=layout.block_size,
            dtype=pool.dtype,
        )
        self._loops: dict[int | None, RingLoop] = {}
        self._take_tokens(self._shard(None))

    def _take_tokens(self, shard: Shard) -> None:
        work = self.work
        block_size = self.pool.layout.block_size
        device = self.pool.device
        ranges = [torch.arange(run.start, run.end) for run in shard.runs]
        positions_T = torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)
        chunk_ids = torch.tensor(work.token_ids, dtype=torch.int64)
        self.input_ids_T = chunk_ids[positions_T - work.start].to(device)
        self.positions_T = positions_T.to(device)
        self.last_token_index: int | None = None
        if shard.runs and shard.runs[-1].end == work.start + len(work.token_ids):
            self.last_token_index = shard.num_tokens - 1
        block_ids = torch.tensor([block.block_id for block in work.blocks], dtype=torch.int64)
        slots_T = block_ids[positions_T // block_size] * block_size + positions_T % block_size
        self._rows = self.pool.rows(slots_T.to(device)) if shard.runs else None

    @property
    def num_tokens(self) -> int:
        """Tokens of the chunk that this rank computes."""
        return self.input_ids_T.shape[0]

    def attend(
        self, layer: int, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor
    ) -> torch.Tensor:
        assert self._rows is not None, "a rank without tokens calls attend_empty"
        self.pool.write_rows(layer, self._rows, k_TKH, v_TKH)
        out_TNH = self._go_round(layer, q_TNH)
        assert out_TNH is not None
        return out_TNH

    def attend_empty(self, layer: int) -> None:
        """Take part in a layer's ring with cached keys alone, or just to pass messages on.

        Raises:
            PeerError: a rank of the ring did not do its part in time.
        """
        assert self._rows is None, "a rank with tokens calls attend"
        self._go_round(layer, None)

    def layer_done(self, layer: int) -> None:
        if self._on_layer_done is not None:
            self._on_layer_done(layer)

    def _go_round(self, layer: int, q_TNH: torch.Tensor | None) -> torch.Tensor | None:
        window = self._config.layer_windows[layer]
        loop = self._loop(window)
        kv_2KLH = self._gather(layer, self._shard(window))
        attend = loop.pass_q if self.work.pass_q else loop.pass_kv
        return attend(q_TNH, kv_2KLH)

    def _gather(self, layer: int, shard: Shard) -> torch.Tensor | None:
        """All blocks that this rank holds of the sequence, new ones too: its KV message."""
        if not shard.block_ids:
            return None
        shape = self._heads.kv_shape(len(shard.block_ids))
        kv_2KLH = self._buffers.take("own", shape, self.pool.dtype)
        self.pool.gather(layer, shard.block_ids, shard.num_keys, kv_2KLH)
        return kv_2KLH

    def _loop(self, window: int | None) -> RingLoop:
        if window not in self._loops:
            partition = Partition(self.work, self.pool.layout.block_size, window)
            self._loops[window] = RingLoop(
                AttentionTiles(partition),
                self.cp_rank,
                self._heads,
                self._comm,
                self._kernel,
                self._buffers,
            )
        return self._loops[window]

    def _shard(self, window: int | None) -> Shard:
        loop = self._loop(window)
        return loop.table.partition.shards[loop.index]


@torch.inference_mode()
def forward_chunk(model: Model, context: RingAttention) -> torch.Tensor | None:
    """Run a chunk on this rank; every rank of its ring calls it.

    Returns:
        hidden_TD of this rank's tokens, or None if it has none.

    Raises:
        PeerError: a rank of the ring did not do its part in time.
    """
    if context.num_tokens:
        return model.forward(context.input_ids_T, context.positions_T, context)
    for layer in range(model.config.num_layers):
        context.attend_empty(layer)
        context.layer_done(layer)
    return None
