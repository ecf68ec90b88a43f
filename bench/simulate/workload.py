"""Traffic drawn from a seed before anything runs: when each request comes, and how long it is.

Arrivals are open loop: nobody waits for an answer before the next request comes. The scheduler is
told a limit of tokens, never the length at which the answer will end; that is what the virtual
model decides (pools.py), as an end-of-sequence token would.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

TOKEN = 1  # what nobody looks at
FIRST_MARK = 16  # ids above it mark prefixes and requests, so that no two prompts are equal


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come.

    The first ``num_prefix_tokens`` of the prompt are those of every request of the same ``prefix``.
    """

    number: int
    time_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    kind: str = ""
    prefix: int = 0
    num_prefix_tokens: int = 0

    @property
    def request_id(self) -> str:
        return f"r{self.number}"

    def prompt(self) -> tuple[int, ...]:
        """Token ids."""
        shared = self.num_prefix_tokens
        head = (FIRST_MARK + 2 * self.prefix, *(TOKEN,) * (shared - 1)) if shared else ()
        own = self.num_prompt_tokens - shared
        return (*head, FIRST_MARK + 2 * self.number + 1, *(TOKEN,) * (own - 1))


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal lengths of a given mean and coefficient of variation; 0 makes them constant."""

    mean: float
    cv: float
    limit: int = 1 << 20

    def draw(self, random: Random) -> int:
        if self.cv == 0:
            return round(self.mean)
        variance = math.log(1 + self.cv**2)
        drawn = random.lognormvariate(math.log(self.mean) - variance / 2, math.sqrt(variance))
        return max(1, min(self.limit, round(drawn)))


def poisson(random: Random, rate: float) -> Iterator[float]:
    """Moments of a Poisson process, without end."""
    now = 0.0
    while True:
        now += random.expovariate(rate)
        yield now


@dataclass(frozen=True, slots=True)
class Mix:
    """A class of requests and its share of the traffic."""

    kind: str
    share: float
    prompt: Lengths
    output: Lengths


def draw(random: Random, rate: float, num_requests: int, mixes: Sequence[Mix]) -> list[Arrival]:
    """Requests of several classes as one Poisson process."""
    arrivals = []
    shares = [mix.share for mix in mixes]
    for number, time_s in zip(range(num_requests), poisson(random, rate), strict=False):
        mix = random.choices(mixes, shares)[0]
        prompt, output = mix.prompt.draw(random), mix.output.draw(random)
        arrivals.append(Arrival(number, time_s, prompt, output, mix.kind))
    return arrivals


def zipf_weights(count: int, exponent: float) -> list[float]:
    """Weights of ranks 1 to ``count``; exponent 0 is uniform."""
    return [(rank + 1) ** -exponent for rank in range(count)]
