"""The layout of one rank's KV pool, and the endpoint of that rank.

A rank's pool is one tensor

    [num_layers, num_blocks, num_kv_heads_local, 2, block_size, head_dim]

so K and V of a range of heads of one block of one layer are one run of bytes: one descriptor per
(layer, block, peer rank), whatever the degrees on either side are. All addresses are computed by
:class:`KVLayout`, the only code that knows the order of the axes.
"""

import msgspec

from protocol.errors import ConfigError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class KVLayout(msgspec.Struct, frozen=True):
    """The shape and strides of one rank's KV pool. All sizes are per rank unless they say total.

    Raises:
        ConfigError: the heads cannot be divided over the ranks, or a size is not positive.
    """

    num_layers: int
    num_blocks: int
    num_kv_heads_total: int
    tp_rank: int
    tp_size: int
    block_size: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        if self.num_kv_heads_total % self.tp_size:
            raise ConfigError(
                f"tp{self.tp_size} does not divide the model's {self.num_kv_heads_total} KV heads: "
                f"choose a tensor-parallel degree that does"
            )
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"KV dtype {self.dtype!r} is not one of {sorted(DTYPE_BYTES)}")
        if min(self.num_layers, self.num_blocks, self.block_size, self.head_dim) < 1:
            raise ConfigError(f"every size of a KV layout must be positive: {self}")

    @property
    def num_kv_heads(self) -> int:
        """KV heads that this rank holds."""
        return self.num_kv_heads_total // self.tp_size

    @property
    def first_kv_head(self) -> int:
        """The model's index of this rank's first KV head."""
        return self.tp_rank * self.num_kv_heads

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        return (
            self.num_layers,
            self.num_blocks,
            self.num_kv_heads,
            2,
            self.block_size,
            self.head_dim,
        )

    @property
    def head_bytes(self) -> int:
        """K and V of one head of one block of one layer."""
        return 2 * self.block_size * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """One block of one layer."""
        return self.num_kv_heads * self.head_bytes

    @property
    def layer_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def num_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    def offset(self, layer: int, block_id: int, kv_head: int) -> int:
        """Bytes from the pool's base to a head's K; ``kv_head`` counts from this rank's first."""
        return layer * self.layer_bytes + block_id * self.block_bytes + kv_head * self.head_bytes

    def is_compatible(self, other: "KVLayout") -> bool:
        """Whether KV can move between the two: the same model and block size, any degrees."""
        mine = (self.num_layers, self.num_kv_heads_total, self.block_size, self.head_dim)
        theirs = (other.num_layers, other.num_kv_heads_total, other.block_size, other.head_dim)
        return (*mine, self.dtype) == (*theirs, other.dtype)


class BlockRef(msgspec.Struct, frozen=True, array_like=True):
    """A block at one allocation of it: the generation rises each time the block is handed out."""

    block_id: int
    generation: int


class RankEndpoint(msgspec.Struct, frozen=True):
    """The address of a rank. ``incarnation`` is new each time the process starts."""

    rank: int
    cp_rank: int
    tp_rank: int
    incarnation: str
    address: str  # the ZMQ address of its transfer thread
    layout: KVLayout
    transport: str = "nixl"
    agent_metadata: bytes = b""  # opaque to all but the transport
    base_address: int = 0  # of the KV pool, in the rank's own address space


class PoolEndpoint(msgspec.Struct, frozen=True):
    """A pool as its peers see it; ``ranks[cp_rank * tp_size + tp_rank]``."""

    pool_id: str
    role: str  # "prefill", "decode" or "store"
    epoch: int
    cp_size: int
    tp_size: int
    ranks: tuple[RankEndpoint, ...]
