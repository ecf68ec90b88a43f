"""The names of ranks, and the configuration of a transfer thread."""

from dataclasses import dataclass

from protocol.kv import KVLayout, RankEndpoint


@dataclass(frozen=True, slots=True, order=True)
class PeerName:
    """A rank as hand-off messages name it."""

    pool_id: str
    rank: int


@dataclass(frozen=True, slots=True)
class RankIdentity:
    """One rank at one start of its process."""

    role: str  # "prefill", "decode" or "store"
    pool_id: str
    rank: int
    cp_size: int
    tp_size: int
    incarnation: str  # unique for all time

    @property
    def cp_rank(self) -> int:
        return self.rank // self.tp_size

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def world_size(self) -> int:
        return self.cp_size * self.tp_size

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    @property
    def name(self) -> PeerName:
        return PeerName(self.pool_id, self.rank)

    @property
    def routing_id(self) -> str:
        return f"{self.pool_id}/{self.rank}/{self.incarnation}"

    def endpoint(self, layout: KVLayout, address: str = "") -> RankEndpoint:
        """How other ranks reach it; the transport adds its own fields."""
        return RankEndpoint(
            rank=self.rank,
            cp_rank=self.cp_rank,
            tp_rank=self.tp_rank,
            incarnation=self.incarnation,
            address=address,
            layout=layout,
        )


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """The configuration of a transfer thread. Durations are in seconds."""

    control_address: str  # the coordinator's
    token: str  # the cluster's secret
    listen: str  # "ipc:///DIR" on one host, "tcp://HOST" between hosts
    model_fingerprint: str
    max_model_len: int
    transport: str = "auto"
    checksum: str = "sampled"  # off, sampled or always
    hello_timeout_s: float = 600.0  # until the whole gang is there
    gang_start: int = 0  # how many times the launcher has started this gang
    coordinator_timeout_s: float = 2.5  # a coordinator without a sign of life is given up
    heartbeat_interval_s: float = 1.0
    busy_poll_s: float = 0.001  # while anything is being handed over
    idle_poll_s: float = 0.02
    lease_s: float = 30.0  # a closing source waits so long for a silent reader
    max_reads: int = 4  # in flight at one time
    failpoints: str = ""  # see protocol.process.failpoints
