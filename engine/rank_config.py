"""The configuration that the ranks of all roles share. No torch: the launcher imports it too."""

import msgspec

from protocol.errors import ConfigError
from protocol.process.failpoints import Failpoints


class RankConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The configuration of a rank, from the launcher; the roles add their own fields.

    Raises:
        ConfigError: a value that no rank can run with.
    """

    model: str  # a checkpoint folder, or the name of an embedded model
    pool_id: str
    control_address: str  # the coordinator's
    token: str  # the cluster's secret
    listen: str  # "ipc:///DIR" on one host, "tcp://HOST" between hosts
    rank: int = 0
    cp_size: int = 1
    tp_size: int = 1
    dtype: str = "auto"
    device: str = "auto"
    block_size: int = 32
    kv_memory_bytes: int = 1 << 30  # 0: what ``memory_budget_bytes`` leaves
    memory_budget_bytes: int = 0  # this rank's part of its machine; 0: what is free when it looks
    # Of each pool on this machine's devices, the number of its ranks; (): this one alone.
    device_sharers: tuple[int, ...] = ()
    max_model_len: int | None = None  # None: the model's
    threads: int = 1
    transport: str = "auto"
    checksum: str = "sampled"
    parent_pid: int = 0  # the process to die with; 0: none
    shutdown_grace_s: float = 30.0  # in which the coordinator says that the cluster ends
    gang_start: int = 0  # which start of the gang this is, counted by the launcher
    log_level: str = "INFO"
    coordinator_timeout_s: float = 2.5  # a coordinator without a sign of life is given up
    start_timeout_s: float = 600.0  # until the whole gang is there
    step_timeout_s: float = 600.0  # a rank that is silent for longer has broken the gang
    lease_s: float = 30.0  # a closing hand-off waits so long for a silent reader
    failpoints: str = ""  # faults to inject, see protocol.process.failpoints; none by default

    def __post_init__(self) -> None:
        if min(self.cp_size, self.tp_size, self.block_size, self.threads) < 1:
            raise ConfigError(f"{self.pool_id}: degrees, sizes and threads must be at least 1")
        if min(self.kv_memory_bytes, self.memory_budget_bytes) < 0:
            raise ConfigError(f"{self.pool_id}: memory cannot be negative")
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"{self.pool_id}: rank {self.rank} of {self.world_size}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"max_model_len {self.max_model_len}: must be at least 2 tokens")
        if not self.listen.startswith(("ipc://", "tcp://")):
            raise ConfigError(f"listen {self.listen}: write ipc:///DIR or tcp://HOST")
        if self.lease_s <= 0:
            raise ConfigError(f"lease_s {self.lease_s}: must be above 0")
        Failpoints(self.failpoints)

    @property
    def world_size(self) -> int:
        return self.cp_size * self.tp_size

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    @property
    def cp_rank(self) -> int:
        return self.rank // self.tp_size

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def same_host(self) -> bool:
        """Whether all ranks see one another's files and shared memory."""
        return self.listen.startswith("ipc://")
