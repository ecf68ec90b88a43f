"""When users come: seeded streams of instants, none of which knows how the server is doing.

``poisson`` is the default. ``gamma`` makes the gaps' coefficient of variation a knob (1 is Poisson,
0 is even, real code assistants reach 13), ``on_off`` is a Markov-modulated Poisson process with two
states, ``ramp`` goes through stages, ``replay`` repeats instants that were recorded.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, takewhile
from random import Random
from statistics import median

import msgspec

from protocol.errors import ConfigError


class Poisson(msgspec.Struct, frozen=True, tag="poisson", tag_field="kind"):
    """Independent users."""

    rate: float

    def times(self, random: Random) -> Iterator[float]:
        now = 0.0
        while True:
            now += random.expovariate(self.rate)
            yield now


class Gamma(msgspec.Struct, frozen=True, tag="gamma", tag_field="kind"):
    """Gaps of a gamma distribution with coefficient of variation ``cv``."""

    rate: float
    cv: float

    def times(self, random: Random) -> Iterator[float]:
        shape = self.cv**-2
        now = 0.0
        while True:
            now += random.gammavariate(shape, 1 / (shape * self.rate))
            yield now


class Constant(msgspec.Struct, frozen=True, tag="constant", tag_field="kind"):
    """A metronome."""

    rate: float

    def times(self, random: Random) -> Iterator[float]:  # noqa: ARG002 - nothing is drawn
        number = 0
        while True:
            number += 1
            yield number / self.rate


class OnOff(msgspec.Struct, frozen=True, tag="on_off", tag_field="kind"):
    """Bursts: exponentially long times at a high rate between such at a low one.

    Args:
        rate: of the whole.
        peak: the high rate as a multiple of the whole.
        on_s: mean length of a burst. The pauses are as long as the whole's rate demands.
        idle: the low rate as a multiple of the whole.
    """

    rate: float
    peak: float = 4.0
    on_s: float = 5.0
    idle: float = 0.0

    def times(self, random: Random) -> Iterator[float]:
        off_s = self.on_s * (self.peak - 1) / (1 - self.idle)
        now, is_on = 0.0, random.random() < self.on_s / (self.on_s + off_s)
        while True:
            until = now + random.expovariate(1 / (self.on_s if is_on else off_s))
            rate = self.rate * (self.peak if is_on else self.idle)
            # the process has no memory: what lies behind the change of state is drawn anew
            while rate and (now := now + random.expovariate(rate)) < until:
                yield now
            now, is_on = until, not is_on


class Ramp(msgspec.Struct, frozen=True, tag="ramp", tag_field="kind"):
    """Poisson arrivals whose rate goes in a line from each stage's start to its end, once.

    Args:
        stages: (rate at the start, rate at the end, seconds).
    """

    stages: tuple[tuple[float, float, float], ...]

    def times(self, random: Random) -> Iterator[float]:
        begun, due = 0.0, random.expovariate(1.0)  # of a process of rate 1, stretched
        for first, last, length_s in self.stages:
            area = (first + last) / 2 * length_s
            while due <= area:
                yield begun + _where(due, first, (last - first) / length_s)
                due += random.expovariate(1.0)
            due -= area
            begun += length_s


class Replay(msgspec.Struct, frozen=True, tag="replay", tag_field="kind"):
    """Instants of a trace, as many times as fast as they were recorded.

    Args:
        jitter_s: width of the stamps' grid in the trace's time; spreads what was rounded onto it.
    """

    stamps: tuple[float, ...]
    speed: float = 1.0
    jitter_s: float = 0.0

    def times(self, random: Random) -> Iterator[float]:
        """In the order of the stamps, which jitter may change: not sorted."""
        first = min(self.stamps, default=0.0)
        for stamp in self.stamps:
            yield (stamp - first + random.random() * self.jitter_s) / self.speed


Arrival = Poisson | Gamma | Constant | OnOff | Ramp | Replay


def check_arrival(arrival: Arrival) -> Arrival:
    """The same.

    Raises:
        ConfigError: it could never end, never begin, or is no such process.
    """
    if not isinstance(arrival, Ramp | Replay) and not 0 < arrival.rate < math.inf:
        raise ConfigError(f"the rate must be above 0 requests per second, not {arrival.rate:g}")
    match arrival:
        case Gamma(cv=cv) if not 0 < cv <= 100:
            raise ConfigError(f"gamma: cv must lie above 0 and up to 100, not {cv:g}")
        case OnOff(peak=peak, on_s=on_s, idle=idle) if peak <= 1 or on_s <= 0 or not 0 <= idle < 1:
            raise ConfigError("on_off: peak must be above 1, on_s above 0 and idle below 1")
        case Ramp(stages=stages) if not stages or any(
            min(stage) < 0 or stage[2] <= 0 for stage in stages
        ):
            raise ConfigError("ramp: stages are START_RATE-END_RATE-SECONDS, none negative")
        case Replay(speed=speed, jitter_s=jitter_s) if speed <= 0 or jitter_s < 0:
            raise ConfigError("replay: speed must be above 0 and jitter_s not negative")
    return arrival


def at_rate(arrival: Arrival, rate: float) -> Arrival:
    """The same process at another rate, for a sweep."""
    match arrival:
        case Ramp(stages=stages):
            total = sum((first + last) / 2 * length_s for first, last, length_s in stages)
            factor = rate * sum(stage[2] for stage in stages) / total
            return Ramp(tuple((a * factor, b * factor, length_s) for a, b, length_s in stages))
        case Replay(stamps=stamps):
            native = (len(stamps) - 1) / ((max(stamps) - min(stamps)) or 1.0)
            return msgspec.structs.replace(arrival, speed=rate / native)
        case _:
            return msgspec.structs.replace(arrival, rate=rate)


def before(times: Iterable[float], duration_s: float) -> Iterator[float]:
    """Those before ``duration_s``, of times in order."""
    return takewhile(lambda time_s: time_s < duration_s, times)


def grid_of(stamps: Sequence[float]) -> float:
    """The width of the grid that stamps were rounded to, 0 when most of them are distinct.

    Mooncake's conversation trace was collected in batches: nine of ten of its gaps are zero, and
    the others are mostly of three seconds.
    """
    gaps = [later - earlier for earlier, later in pairwise(sorted(stamps))]
    positive = [gap for gap in gaps if gap > 0]
    if not positive or 2 * len(positive) > len(gaps):
        return 0.0
    return median(positive)


def _where(area: float, rate: float, slope: float) -> float:
    """The t at which ``rate * t + slope * t**2 / 2`` is ``area``, in a form that slope 0 allows."""
    root = math.sqrt(max(0.0, rate * rate + 2 * slope * area))
    return 2 * area / (rate + root)
