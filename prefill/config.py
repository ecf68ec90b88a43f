"""The configuration of a rank of a prefill pool; see :class:`engine.rank_config.RankConfig`."""

from engine.rank_config import RankConfig
from protocol.errors import ConfigError


class PrefillConfig(RankConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A rank of a prefill pool.

    Args:
        chunk_tokens: tokens of a chunk for each rank of its ring. A chunk passes the whole prefix
            round the ring once, so longer chunks cost less and hold the ranks for longer.
        step_target_s: a step takes in more work as long as its predicted time stays below this, or
            below that of its longest item.
        max_num_sequences: requests that hold blocks at the same time.
        layers_per_group: layers that are announced together; 0 chooses about eight groups.
        fetch_threshold_tokens: of a prefix that the decode pool holds and this one does not, fewer
            are computed again rather than fetched; 1 fetches whatever there is.
        fetch_timeout_s: a fetch that is not complete by then is given up, and computed instead.
        ring_threshold_tokens: fewer tokens to compute never ring; None leaves it to the cost model.

    Raises:
        ConfigError: a value that no rank can run with.
    """

    chunk_tokens: int = 2048
    step_target_s: float = 0.25
    max_num_sequences: int = 64
    layers_per_group: int = 0
    fetch_threshold_tokens: int = 1
    fetch_timeout_s: float = 30.0
    ring_threshold_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.chunk_tokens, self.max_num_sequences) < 1:
            raise ConfigError("chunk_tokens and max_num_sequences must be at least 1")
        if self.fetch_threshold_tokens < 1:
            raise ConfigError("fetch_threshold_tokens must be at least 1")
        if self.layers_per_group < 0:
            raise ConfigError("layers_per_group must be at least 0")
        if min(self.step_target_s, self.fetch_timeout_s) <= 0:
            raise ConfigError("step_target_s and fetch_timeout_s must be above 0")
