"""From what an operator writes to a ``Plan``: the flags of ``baton bench``, read and checked."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from bench.load.analysis.slo import Slo, load_slo
from bench.load.driving.client import Budgets
from bench.load.driving.driver import Target
from bench.load.run import Plan
from bench.load.workload.arrival import Arrival, Constant, Replay, at_rate
from bench.load.workload.schedule import Schedule, draw, draw_trace, replay_of
from bench.load.workload.sessions import Cancellations, Workload
from bench.load.workload.specs import arrival_of, cancellations_of, workload_of
from bench.load.workload.traces import BLOCK_SIZE, Row, load_trace
from protocol.errors import ConfigError


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides a load, as it was written."""

    workload: str = "lengths"
    arrival: str = "poisson"
    rate: float | None = None
    duration_s: float | None = None
    requests: int | None = None
    seed: int = 0
    cancel: str = ""
    users: int | None = None
    """A closed loop of so many."""
    trace: str = ""
    speed: float | None = None
    jitter_s: float | None = None
    scale: float = 1.0
    block_size: int = BLOCK_SIZE
    slo: str = ""
    timeout_s: float = 600.0
    processes: int | None = None
    timelines: bool = True
    samples: bool = True
    """Of a Baton cluster's own state, once a second."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How schedules of one kind are drawn: a sweep needs many."""

    options: Options
    workload: Workload
    arrival: Arrival
    cancellations: Cancellations | None
    rows: tuple[Row, ...]
    slo: Slo | None

    def schedule(
        self, seed: int, rate: float | None = None, requests: int | None = None
    ) -> Schedule:
        """One draw, at another rate where one is given."""
        options = self.options
        arrival = self.arrival if rate is None else at_rate(self.arrival, rate)
        most = requests or options.requests
        if isinstance(arrival, Replay):
            return draw_trace(
                self.rows,
                seed,
                replay=arrival,
                block_size=options.block_size,
                scale=options.scale,
                max_requests=most,
            )
        duration_s = float("inf") if requests or options.duration_s is None else options.duration_s
        return draw(
            self.workload,
            arrival,
            seed,
            duration_s=duration_s,
            max_requests=most,
            cancellations=self.cancellations,
        )

    def plan(self, target: Target, command: str, schedule: Schedule, rate: float | None) -> Plan:
        """The plan of one run."""
        options = self.options
        return Plan(
            target,
            schedule,
            self._describe_workload(),
            self._describe_arrival(rate),
            self.slo,
            Budgets(total_s=options.timeout_s, silence_s=min(120.0, options.timeout_s)),
            "closed" if options.users else "open",
            options.users or 1,
            options.duration_s if options.users else None,
            options.processes,
            options.timelines,
            command,
        )

    def _describe_workload(self) -> dict[str, Any]:
        if self.rows:
            options = self.options
            digest = hashlib.sha256(Path(options.trace).read_bytes()).hexdigest()
            return {
                "kind": "trace",
                "file": options.trace,
                "sha256": digest,
                "num_rows": len(self.rows),
                "scale": options.scale,
                "block_size": options.block_size,
            }
        described: dict[str, Any] = msgspec.to_builtins(self.workload)
        if self.cancellations is not None:
            described["cancellations"] = msgspec.to_builtins(self.cancellations)
        return described

    def _describe_arrival(self, rate: float | None) -> dict[str, Any]:
        if self.options.users:
            return {"kind": "closed", "num_users": self.options.users}
        arrival = self.arrival if rate is None else at_rate(self.arrival, rate)
        if isinstance(arrival, Replay):
            return {"kind": "replay", "speed": arrival.speed, "jitter_s": arrival.jitter_s}
        described: dict[str, Any] = msgspec.to_builtins(arrival)
        return described


def recipe_of(options: Options) -> Recipe:
    """Read and check everything that was written.

    Raises:
        ConfigError: a mistake in it, named.
    """
    rows: tuple[Row, ...] = ()
    arrival: Arrival
    if options.trace:
        if options.cancel or options.users:
            raise ConfigError("--cancel and --users do not go with --trace")
        rows = tuple(load_trace(Path(options.trace)))
        arrival = _replay(options, rows)
    elif options.users:
        if options.requests is None:
            raise ConfigError("a closed loop needs --requests: how many there are to be taken")
        arrival = Constant(1.0)  # nobody looks at it: users come when they are free
    else:
        if options.duration_s is None and options.requests is None:
            raise ConfigError("say how long: --duration SECONDS or --requests N")
        arrival = arrival_of(options.arrival, options.rate)
    return Recipe(
        options,
        workload_of(options.workload),
        arrival,
        cancellations_of(options.cancel) if options.cancel else None,
        rows,
        load_slo(options.slo) if options.slo else None,
    )


def _replay(options: Options, rows: tuple[Row, ...]) -> Replay:
    replay = replay_of(rows, options.speed or 1.0)
    if options.jitter_s is not None:
        replay = msgspec.structs.replace(replay, jitter_s=options.jitter_s)
    if options.duration_s is not None:
        first = min(replay.stamps)
        until = first + options.duration_s * replay.speed
        kept = tuple(stamp for stamp in replay.stamps if stamp < until)
        replay = msgspec.structs.replace(replay, stamps=kept)
    if options.rate is not None:
        rescaled = at_rate(replay, options.rate)
        assert isinstance(rescaled, Replay)
        replay = rescaled
    return replay
