"""One rank's KV memory: a tensor in the order that KVLayout lays down.

The life of a block's bytes
1. the model writes the K and V of new tokens of one layer at their slots (``write``);
2. attention reads blocks in place (``layer``), or has a prefix of one sequence laid out in one
   piece (``gather``);
3. a transfer reads or writes them at byte offsets from ``base_address`` (``bytes``, ``view``);
4. a pre-empted sequence's blocks go to host memory and come back (``save``, ``restore``).

The owners of blocks are not known here; see :mod:`kvcache.blocks`.
"""

from collections.abc import Iterator, Sequence

import torch

from protocol.errors import ConfigError
from protocol.kv import KVLayout

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_PAGE_BYTES = 4096


class KVPool:
    """The KV tensor of one rank, [num_layers, num_blocks, K, 2, block_size, H].

    Args:
        layout: its shape, strides and dtype.
        device: where it lies; on CPU it is page-aligned and its pages are touched once, here.
    """

    def __init__(self, layout: KVLayout, device: torch.device | str = "cpu") -> None:
        self.layout = layout
        self.device = torch.device(device)
        self.dtype = TORCH_DTYPES[layout.dtype]
        self.bytes = _allocate(layout.num_bytes, self.device)  # uint8 [num_bytes]
        self.tensor = self.bytes.view(self.dtype).view(layout.shape)
        self.base_address = self.bytes.data_ptr()
        self._layers = list(self.tensor.unbind(0))
        self._layer_rows = [layer.view(-1, layout.head_dim) for layer in self._layers]
        self._head_rows_K = (
            torch.arange(layout.num_kv_heads, device=self.device) * 2 * layout.block_size
        )
        self._scratch = self.new_scratch(0)

    def layer(self, index: int) -> torch.Tensor:
        """One layer, [num_blocks, K, 2, block_size, H]."""
        return self._layers[index]

    def view(self) -> memoryview:
        """All bytes, writable, for sockets and checksums.

        Raises:
            ConfigError: the pool is not in host memory.
        """
        if self.device.type != "cpu":
            raise ConfigError(
                f"a KV pool on {self.device} has no bytes in host memory: use --transport nixl"
            )
        return self.bytes.numpy().data

    # -- writing -----------------------------------------------------------------------------------

    def rows(self, slots_T: torch.Tensor) -> torch.Tensor:
        """Where the K of each slot's heads lies: int64 [T * K], in rows of H of a layer.

        The same for every layer: compute it once per step and call :meth:`write_rows`.

        Args:
            slots_T: int64, ``block_id * block_size + offset`` of each token, on the pool's device.
        """
        blocks_T = torch.div(slots_T, self.layout.block_size, rounding_mode="floor")
        # The row of the slot is blocks * 2 * K * block_size + offset. ``slots`` already counts
        # block_size rows for each block, so the rest is added.
        stride = (2 * self.layout.num_kv_heads - 1) * self.layout.block_size
        return ((slots_T + blocks_T * stride).unsqueeze(1) + self._head_rows_K).view(-1)

    def write_rows(
        self, layer: int, rows: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor
    ) -> None:
        """Store K and V of T tokens of one layer at :meth:`rows`."""
        target = self._layer_rows[layer]
        target.index_copy_(0, rows, k_TKH.reshape(-1, self.layout.head_dim))
        target.index_copy_(
            0, rows + self.layout.block_size, v_TKH.reshape(-1, self.layout.head_dim)
        )

    def write(
        self, layer: int, slots_T: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor
    ) -> None:
        """Store K and V of T tokens of one layer at their slots, which are all different."""
        self.write_rows(layer, self.rows(slots_T), k_TKH, v_TKH)

    # -- reading -----------------------------------------------------------------------------------

    def new_scratch(self, num_tokens: int) -> torch.Tensor:
        """Room for :meth:`gather`: [2, K, at least num_tokens, H], whole blocks, uninitialised."""
        block_size = self.layout.block_size
        length = -(-num_tokens // block_size) * block_size
        shape = (2, self.layout.num_kv_heads, length, self.layout.head_dim)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def gather(
        self,
        layer: int,
        block_ids: Sequence[int],
        num_tokens: int,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first ``num_tokens`` tokens that lie in ``block_ids``, in one piece.

        Args:
            layer: which one.
            block_ids: in the order of the sequence, covering at least ``num_tokens``.
            num_tokens: S.
            out: from :meth:`new_scratch`; without it, room of the pool's own is used, and what is
                returned holds only until the next such call.

        Returns:
            (k_SKH, v_SKH): last stride 1, strided over heads.
        """
        if out is None:
            if self._scratch.shape[2] < num_tokens:
                self._scratch = self.new_scratch(num_tokens)
            out = self._scratch
        block_size = self.layout.block_size
        source = self._layers[layer]
        num_blocks = -(-num_tokens // block_size)
        out_2KNBH = out.view(*out.shape[:2], out.shape[2] // block_size, *source.shape[3:])
        for index, first, count in _adjacent(block_ids[:num_blocks]):
            piece_2KnBH = source[first : first + count].permute(2, 1, 0, 3, 4)
            out_2KNBH[:, :, index : index + count].copy_(piece_2KnBH)
        k_KSH, v_KSH = out[:, :, :num_tokens].unbind(0)
        return k_KSH.transpose(0, 1), v_KSH.transpose(0, 1)

    # -- host memory -------------------------------------------------------------------------------

    def save(self, block_ids: Sequence[int]) -> torch.Tensor:
        """A copy of these blocks of every layer in host memory, [L, n, K, 2, block_size, H]."""
        index = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
        return self.tensor.index_select(1, index).cpu()

    def restore(self, block_ids: Sequence[int], saved: torch.Tensor) -> None:
        """Put back what :meth:`save` gave, into the same or other blocks, in the same order."""
        index = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
        self.tensor.index_copy_(1, index, saved.to(self.device))


def _allocate(num_bytes: int, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    # Filling touches every page, which torch.zeros would leave to the first request.
    memory = torch.empty(num_bytes + _PAGE_BYTES, dtype=torch.uint8).fill_(0)
    start = -memory.data_ptr() % _PAGE_BYTES
    return memory[start : start + num_bytes]


def _adjacent(block_ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of consecutive ids as (index of the first, its id, how many)."""
    start = 0
    for index in range(1, len(block_ids) + 1):
        if index == len(block_ids) or block_ids[index] != block_ids[index - 1] + 1:
            yield start, block_ids[start], index - start
            start = index
