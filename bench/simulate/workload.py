"""Traffic of the experiments, as schedules of the load harness.

The scheduler is told a limit of tokens, never the length at which an answer ends: a turn's
``max_tokens`` is that length, and the virtual model keeps to it (pools.py).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from bench.load.workload.arrival import Poisson
from bench.load.workload.schedule import Schedule, draw
from bench.load.workload.sessions import Turn, TurnSource


def lengths(mean: float, cv: float = 0.0) -> str:
    """A log-normal length of a given mean and coefficient of variation; 0 makes it constant."""
    if cv == 0:
        return f"{mean:g}"
    variance = math.log(1 + cv**2)
    return f"lognormal/{mean * math.exp(-variance / 2):.6f}/{math.sqrt(variance):.6f}"


@dataclass(frozen=True, slots=True)
class Blend:
    """Kinds of requests in one stream, each with its share of the traffic."""

    parts: Sequence[tuple[float, TurnSource]]

    def sessions(self, random: Random) -> Iterator[tuple[Turn, ...]]:
        streams = [part.sessions(random) for _, part in self.parts]
        shares = [share for share, _ in self.parts]
        while True:
            yield next(random.choices(streams, shares)[0])


def traffic(workload: TurnSource, rate: float, seed: int, num_requests: int) -> Schedule:
    """Independent users, ``rate`` of them a second."""
    return draw(workload, Poisson(rate), seed, duration_s=math.inf, max_requests=num_requests)
