"""The configuration of the process of a store; see :class:`engine.rank_config.RankConfig`."""

from engine.rank_config import RankConfig
from protocol.errors import ConfigError


class StoreConfig(RankConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A store. ``kv_memory_bytes`` is its host memory.

    Args:
        folder: where packs lie; of this store alone.
        disk_quota_bytes: the packs take no more than that.
        num_io_threads: packs that are read or written at one time.
        pack_blocks: blocks of one pack at most.
        disk_io: how packs are read and written, see :mod:`store.disk_io`.

    Raises:
        ConfigError: a value that no store can run with.
    """

    folder: str
    disk_quota_bytes: int = 64 << 30
    num_io_threads: int = 2
    pack_blocks: int = 256
    disk_io: str = "vectored"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.world_size != 1:
            raise ConfigError(f"{self.pool_id}: a store is one process with all heads")
        sizes = (self.kv_memory_bytes, self.pack_blocks, self.disk_quota_bytes)
        if min(self.num_io_threads, *sizes) < 1:
            raise ConfigError(
                "num_io_threads, kv_memory_bytes, pack_blocks and disk_quota_bytes: at least 1"
            )
