"""The whole run, drawn from the seed before its start: who sends what, and when.

1. ``draw`` takes instants from an arrival process and sessions from a workload, ``draw_trace`` both
   from a trace. Every request gets its index, its kind and its cancellation.
2. ``Schedule.sha256`` is of all of it: two runs with the same one asked the same of their servers.
3. ``Schedule.deal`` splits it by session among the processes that drive the load.
"""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import islice
from random import Random

import msgspec

from bench.load.workload.arrival import Arrival, Replay, before, check_arrival, grid_of
from bench.load.workload.sessions import Cancellations, Segment, Turn, TurnSource, check_workload
from bench.load.workload.traces import BLOCK_SIZE, Row, turn_of
from protocol.errors import ConfigError

SCHEDULE_VERSION = 1
MAX_REQUESTS = 1_000_000


class Planned(msgspec.Struct, frozen=True):
    """One request to come."""

    index: int
    session: str
    at_s: float
    """Of the session's first turn, from the run's start. The other turns follow their answers."""
    turn: int
    what: Turn
    cancel_after_s: float | None = None


class Schedule(msgspec.Struct, frozen=True):
    """All of a run's requests, ordered by the start of their sessions."""

    version: int
    seed: int
    requests: tuple[Planned, ...]
    wording: int | None = None
    """Another seed, of what the prompts say: the same load without the same words."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()

    @property
    def duration_s(self) -> float:
        """When the last session begins."""
        return self.requests[-1].at_s if self.requests else 0.0

    @property
    def num_output_tokens(self) -> int:
        return sum(planned.what.max_tokens for planned in self.requests)

    @property
    def sessions(self) -> list[list[Planned]]:
        """Each session's turns, in order."""
        found: dict[str, list[Planned]] = {}
        for planned in self.requests:
            found.setdefault(planned.session, []).append(planned)
        return list(found.values())

    def deal(self, num_parts: int) -> list["Schedule"]:
        """Session by session in turn: every part sees the whole duration."""
        parts: list[list[Planned]] = [[] for _ in range(num_parts)]
        for number, turns in enumerate(self.sessions):
            parts[number % num_parts] += turns
        return [Schedule(self.version, self.seed, tuple(part), self.wording) for part in parts]


def draw(
    workload: TurnSource,
    arrival: Arrival,
    seed: int,
    *,
    duration_s: float,
    max_requests: int | None = None,
    cancellations: Cancellations | None = None,
) -> Schedule:
    """Sessions that begin before ``duration_s``, until there are ``max_requests`` requests.

    Raises:
        ConfigError: nothing would ever be sent, or more than a machine can hold.
    """
    check_workload(workload, cancellations)
    starts = before(check_arrival(arrival).times(Random(f"{seed}/arrival")), duration_s)
    most = MAX_REQUESTS + 1 if max_requests is None else max_requests
    sessions = workload.sessions(Random(f"{seed}/workload"))
    return _number(zip(starts, sessions, strict=False), seed, most, cancellations)


def draw_trace(
    rows: Sequence[Row],
    seed: int,
    *,
    replay: Replay | None = None,
    block_size: int = BLOCK_SIZE,
    scale: float = 1.0,
    max_requests: int | None = None,
) -> Schedule:
    """A trace's rows at their own times.

    Args:
        replay: speed and jitter; its stamps are the rows'. None is as recorded, with stamps that
            lie on a grid spread over it.
        block_size: tokens behind each hash id.
        scale: of all lengths.

    Raises:
        ConfigError: a row is not of this block size.
    """
    arrival = replay or replay_of(rows)
    times = check_arrival(arrival).times(Random(f"{seed}/arrival"))
    rows = rows[:max_requests]
    turns = (
        (turn_of(row, number, block_size=block_size, scale=scale),)
        for number, row in enumerate(rows)
    )
    pairs = sorted(zip(times, turns, strict=False), key=lambda pair: pair[0])
    return _number(pairs, seed, MAX_REQUESTS + 1, None)


def replay_of(rows: Sequence[Row], speed: float = 1.0) -> Replay:
    """The rows' stamps; where they lie on a grid, spread over its width."""
    stamps = tuple(row.at_s for row in rows)
    return Replay(stamps, speed, grid_of(stamps))


def _number(
    pairs: Iterable[tuple[float, tuple[Turn, ...]]],
    seed: int,
    most: int,
    cancellations: Cancellations | None,
) -> Schedule:
    random = Random(f"{seed}/cancellations")
    requests: list[Planned] = []
    for number, (at_s, turns) in enumerate(pairs):
        if len(requests) >= most:
            break
        kept = list(islice(turns, most - len(requests)))
        cancel_s = cancellations.draw(random) if cancellations is not None else None
        for turn, what in enumerate(kept):
            is_last = turn == len(kept) - 1
            requests.append(
                Planned(
                    len(requests),
                    f"s{seed}-{number}",
                    at_s,
                    turn,
                    what,
                    cancel_s if is_last else None,
                )
            )
    if not requests:
        raise ConfigError("no request falls into the duration: raise the rate or the duration")
    if len(requests) > MAX_REQUESTS:
        raise ConfigError(f"more than {MAX_REQUESTS} requests: lower the rate or the duration")
    return Schedule(SCHEDULE_VERSION, seed, tuple(requests))


def ideal_cached_share(schedule: Schedule) -> float:
    """The share of prompt tokens that a cache without limits would have, segment by segment.

    Answers are not counted, as what they will be is not known here.
    """
    known: set[bytes] = set()
    num_tokens = num_cached = 0
    for turns in schedule.sessions:
        history: tuple[Segment, ...] = ()
        for planned in turns:
            history = (history if planned.what.keeps_history else ()) + planned.what.segments
            chain = b""
            for segment in history:
                digest = hashlib.blake2b(chain + repr(segment).encode(), digest_size=16).digest()
                num_tokens += segment.num_tokens
                num_cached += segment.num_tokens if digest in known else 0
                known.add(chain := digest)
    return num_cached / num_tokens if num_tokens else 0.0
