"""The configuration of a rank of a decode pool; see :class:`engine.rank_config.RankConfig`."""

from engine.rank_config import RankConfig
from protocol.errors import ConfigError


class DecodeConfig(RankConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A rank of a decode pool.

    Args:
        token_budget: tokens computed in one step: one for each decoding sequence, the rest for
            chunks of prompts that are computed here. More makes prompts faster and the tokens of
            the others later.
        max_num_sequences: requests that hold blocks, or wait in host memory, at the same time.
        watermark: share of the blocks that is left for running sequences when one is admitted.
        swap_memory_bytes: host memory on each rank for the KV of pre-empted sequences; when it is
            full, their KV is dropped and computed again.
        store_threshold_tokens: fewer tokens of a prefix are computed rather than brought from a
            store.

    Raises:
        ConfigError: a value that no rank can run with.
    """

    token_budget: int = 512
    max_num_sequences: int = 64
    watermark: float = 0.01
    swap_memory_bytes: int = 4 << 30
    store_threshold_tokens: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cp_size != 1:
            raise ConfigError(
                f"{self.pool_id}: a decode pool has no context parallelism, cp{self.cp_size} was "
                f"asked for: use tp"
            )
        if self.max_num_sequences < 1:
            raise ConfigError("max_num_sequences must be at least 1")
        if self.token_budget < self.max_num_sequences:
            raise ConfigError(
                f"token_budget {self.token_budget} is below max_num_sequences "
                f"{self.max_num_sequences}: each decoding sequence needs one token a step"
            )
        if not 0 <= self.watermark < 1 or self.swap_memory_bytes < 0:
            raise ConfigError("watermark must be in [0, 1), swap_memory_bytes at least 0")
