"""The part of this machine's memory that each process may have. Pure.

On CPU all ranks of a local cluster live in one memory. It is measured once, before anything is
started, so that ranks which start at the same moment do not count the same bytes twice. A rank that
is started again gets the same part.
"""

from dataclasses import dataclass

from kvcache.host_memory import CPU_SHARE, CUDA_SHARE, Room
from launcher.config import parse_size
from protocol.errors import ConfigError

AUTO = "auto"
COORDINATOR_BYTES = 512 << 20  # with the processes that read, render and tokenize for it
_GIB, _MIB = 1 << 30, 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory of every rank that computes."""

    kv_bytes: int  # of each; 0: as much as its part leaves
    budget_bytes: int  # each rank's part; 0: the rank measures itself
    asked: str = AUTO  # --kv-memory as given

    def found_by(self, device: str) -> str:
        """How the size of the KV memory is found, in words."""
        if self.asked != AUTO:
            return f"--kv-memory {self.asked}"
        share = CUDA_SHARE if device == "cuda" else CPU_SHARE
        part = f" of its {self.budget_bytes // _MIB} MiB" if self.budget_bytes else ""
        return f"auto: {share:.0%} of what a rank's weights and largest step leave{part}"


def share_out(kv_memory: str, num_ranks: int, store_bytes: int, room: Room | None) -> MemoryPlan:
    """Share ``room`` out to ``num_ranks`` ranks and a store.

    Args:
        kv_memory: "auto", or a size for each rank.
        room: the free memory of the machine; None where the ranks do not share one.

    Raises:
        ConfigError: not a size, or more than there is.
    """
    kv_bytes = 0 if kv_memory == AUTO else parse_size("--kv-memory", kv_memory)
    if room is None:
        return MemoryPlan(kv_bytes, 0, kv_memory)
    left = room.num_bytes - COORDINATOR_BYTES - store_bytes
    asked = kv_bytes * num_ranks + store_bytes
    if asked > room.num_bytes:
        store = f" and --store-memory {store_bytes // _MIB} MiB" if store_bytes else ""
        raise ConfigError(
            f"--kv-memory {kv_memory} for each of {num_ranks} ranks{store} are "
            f"{asked // _MIB} MiB, and {room.num_bytes // _MIB} MiB are left on this machine "
            f"({room.bound}): give less, or auto"
        )
    return MemoryPlan(kv_bytes, max(1, left // num_ranks), kv_memory)


def body_bytes(memory: int) -> int:
    """The limit on all bodies of requests in flight: an eighth of memory, a GiB at most."""
    return max(64 * _MIB, min(_GIB, memory // 8))


def text_worker_bytes(memory: int) -> int:
    """The limit on a text worker's address space: a quarter of memory, within reason."""
    return max(512 * _MIB, min(4 * _GIB, memory // 4))
