"""Whether a rank may join: everything about its HELLO that does not need the pool's state. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.config import ExpectedPool
from protocol.errors import PeerError
from protocol.kv import KVLayout
from protocol.messages import PROTOCOL_VERSION, Hello


class HelloRefused(PeerError):
    """A rank of the cluster cannot join it."""


@dataclass(frozen=True, slots=True)
class JoinRequirements:
    """What every rank of the cluster must agree to."""

    model_fingerprint: str  # of the model that the coordinator tokenizes for
    block_size: int

    def check(self, hello: Hello, spec: ExpectedPool | None, others: Iterable[Hello]) -> None:
        """Check a HELLO.

        Args:
            hello: the rank's.
            spec: what its pool is expected to be; None if there is no such pool.
            others: of every rank that has joined.

        Raises:
            HelloRefused: it cannot join.
        """
        if hello.version != PROTOCOL_VERSION:
            raise HelloRefused(
                f"protocol version {hello.version}, this coordinator speaks {PROTOCOL_VERSION}"
            )
        if spec is None:
            raise HelloRefused(f"this cluster has no pool {hello.pool_id!r}")
        _check_place(hello, spec)
        if hello.model_fingerprint != self.model_fingerprint:
            raise HelloRefused(
                f"{hello.pool_id} rank {hello.endpoint.rank} has loaded another model "
                f"({hello.model_fingerprint!r}, not {self.model_fingerprint!r}): "
                f"every machine needs the same checkpoint"
            )
        self._check_layout(hello.endpoint.layout, hello, others)

    def _check_layout(self, layout: KVLayout, hello: Hello, others: Iterable[Hello]) -> None:
        where = f"{hello.pool_id} rank {hello.endpoint.rank}"
        if layout.block_size != self.block_size:
            raise HelloRefused(f"{where}: block size {layout.block_size}, not {self.block_size}")
        if (layout.tp_rank, layout.tp_size) != (hello.endpoint.tp_rank, hello.tp_size):
            raise HelloRefused(f"{where}: its KV layout is of another rank")
        for other in others:
            if not layout.is_compatible(other.endpoint.layout):
                raise HelloRefused(
                    f"{where}: its KV cannot move to {other.pool_id} (dtype, heads or layers)"
                )


def _check_place(hello: Hello, spec: ExpectedPool) -> None:
    endpoint = hello.endpoint
    said = (hello.role, hello.cp_size, hello.tp_size)
    if said != (spec.role, spec.cp_size, spec.tp_size):
        raise HelloRefused(f"{hello.pool_id} is {spec}, not {said}")
    is_in_mesh = 0 <= endpoint.rank < spec.num_ranks and divmod(endpoint.rank, spec.tp_size) == (
        endpoint.cp_rank,
        endpoint.tp_rank,
    )
    if not is_in_mesh:
        raise HelloRefused(f"{hello.pool_id} has no rank {endpoint.rank} at that mesh position")
    if (hello.gang is not None) != (endpoint.rank == 0):
        raise HelloRefused("the leader, and only it, says where the gang meets")
