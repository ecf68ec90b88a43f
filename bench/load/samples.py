"""What a Baton cluster said of itself beside a run: ``cluster.jsonl``, a line for every answer.

Each line is the cluster's own ``GET /v1/cluster`` at one instant of the run, without what does not
change. Pools tell their coordinator how they are once a second, so what a line says of them may be
a second old.
"""

from collections.abc import Iterable
from pathlib import Path

import msgspec

from protocol.errors import ConfigError

SAMPLES_FILE = "cluster.jsonl"


class Blocks(msgspec.Struct, frozen=True, omit_defaults=True):
    """One block space; ``free + owned + in_flight + cached == total``."""

    total: int = 0
    free: int = 0
    owned: int = 0
    in_flight: int = 0
    cached: int = 0

    @property
    def held(self) -> int:
        """What nothing new can have: a cached block is given away as soon as it is wanted."""
        return self.total - self.free - self.cached


class PoolSample(msgspec.Struct, frozen=True, omit_defaults=True):
    """One pool, as its leader last told it."""

    pool_id: str
    role: str
    """"prefill" or "decode"."""
    serving: bool = True
    num_running: int = 0
    num_waiting: int = 0
    pending_tokens: int = 0
    blocks: tuple[Blocks, ...] = ()
    """One for each block space."""
    counters: dict[str, float] = {}
    """The leader's, which only rise until the pool is started again."""


class ClusterSample(msgspec.Struct, frozen=True, omit_defaults=True):
    """A cluster at one instant, in seconds from the run's start on the driver's clock."""

    target: str
    at_s: float
    """The middle between question and answer."""
    round_trip_s: float
    num_active_requests: int
    pools: tuple[PoolSample, ...]


class _Rank(msgspec.Struct):
    counters: dict[str, float] = {}


class _Pool(PoolSample, frozen=True):
    ranks: tuple[_Rank, ...] = ()


class _Cluster(msgspec.Struct):
    pools: tuple[_Pool, ...]
    num_active_requests: int = 0


_CLUSTER = msgspec.json.Decoder(_Cluster)
_SAMPLE = msgspec.json.Decoder(ClusterSample)
_ENCODER = msgspec.json.Encoder()


def sample_of(answer: bytes, target: str, at_s: float, round_trip_s: float) -> ClusterSample | None:
    """The answer of ``/v1/cluster``; None where it is not that of a Baton cluster with pools."""
    try:
        told = _CLUSTER.decode(answer)
    except msgspec.DecodeError:
        return None
    if not told.pools:
        return None
    kept = PoolSample.__struct_fields__
    pools = tuple(
        PoolSample(
            **{name: getattr(pool, name) for name in kept if name != "counters"},
            counters=pool.ranks[0].counters if pool.ranks else {},
        )
        for pool in told.pools
    )
    return ClusterSample(
        target, round(at_s, 4), round(round_trip_s, 5), told.num_active_requests, pools
    )


def shifted_sample(sample: ClusterSample, by_s: float) -> ClusterSample:
    """The same, as of a later block of a comparison."""
    return msgspec.structs.replace(sample, at_s=sample.at_s + by_s)


def write_samples(folder: Path, samples: Iterable[ClusterSample]) -> None:
    """The file, if there is a sample; one that an earlier run has left is taken away."""
    lines = [_ENCODER.encode(sample) + b"\n" for sample in samples]
    if lines:
        (folder / SAMPLES_FILE).write_bytes(b"".join(lines))
    else:
        (folder / SAMPLES_FILE).unlink(missing_ok=True)


def read_samples(folder: Path) -> list[ClusterSample]:
    """All samples of a run; none where it has left none.

    Raises:
        ConfigError: a line of the file is not a sample.
    """
    path = folder / SAMPLES_FILE
    if not path.exists():
        return []
    samples: list[ClusterSample] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            samples.append(_SAMPLE.decode(line))
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}:{number}: {error}") from error
    return samples
