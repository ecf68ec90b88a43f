"""Many runs: at given rates, or at those that a search for goodput asks for.

A folder of a sweep has ``sweep.json`` and one folder per run, ``rate-R-seed-S``.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench.load.analysis.goodput import Goodput, Point, Search, Verdict, judge, most_missed
from bench.load.analysis.slo import Slo
from bench.load.analysis.validity import NOT_THE_DRIVERS, STOPPED
from bench.load.driving.driver import Progress, Target
from bench.load.driving.process import OnProgress
from bench.load.planning import Recipe
from bench.load.record import Manifest, RequestRecord, write_run
from bench.load.run import execute
from bench.load.samples import ClusterSample
from protocol.errors import ConfigError

SWEEP_FILE = "sweep.json"


def wording_of(seed: int, rate: float) -> int:
    """What the prompts of a round are drawn from: a server must not find in its cache at one rate
    what it computed at another."""
    digest = hashlib.blake2b(f"{seed}/{rate!r}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")


class InvalidRunError(RuntimeError):
    """The driver could not keep up, or was stopped: going on would not measure the server."""


class SweepRecord(msgspec.Struct, frozen=True):
    """``sweep.json``."""

    command: str
    target: str
    num_accelerators: int
    points: tuple[Point, ...]
    low: float | None = None
    high: float | None = None
    """Goodput lies between these, in requests per second of all accelerators; of a search."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What all points have in common.

    Args:
        on_progress: sees every run's progress.
        on_run: sees every run's end.
        num_rounds: runs per rate, each with its own seed.
        min_requests: of each rate, over its rounds.
    """

    target: Target
    recipe: Recipe
    slo: Slo
    folder: Path
    command: str = ""
    on_progress: OnProgress | None = None
    on_run: Callable[[float, Manifest, Sequence[RequestRecord]], None] | None = None
    num_rounds: int = 3
    min_requests: int = 300

    def point(self, rate: float) -> Point:
        """Rounds at one rate until the verdict.

        Raises:
            InvalidRunError: the driver failed, not the server.
        """
        num_requests = -(-self.min_requests // self.num_rounds)
        rounds: list[list[RequestRecord]] = []
        folders: list[str] = []
        verdict: Verdict | None = None
        is_lost = False
        while verdict is None and not is_lost:
            seed = self.recipe.options.seed + len(rounds)
            records, is_lost = self._round(rate, seed, num_requests, folders)
            rounds.append(records)
            verdict = judge(rounds, self.slo, max_rounds=self.num_rounds)
        if verdict is None or is_lost:  # ended early: the targets were out of reach
            final = judge(rounds, self.slo, max_rounds=len(rounds))
            assert final is not None
            verdict = Verdict(False, True, final.shares)
        return Point(rate, verdict, len(rounds), tuple(folders))

    def _round(
        self, rate: float, seed: int, num_requests: int, folders: list[str]
    ) -> tuple[list[RequestRecord], bool]:
        drawn = self.recipe.schedule(seed, rate, num_requests)
        schedule = msgspec.structs.replace(drawn, wording=wording_of(seed, rate))
        most = most_missed(self.slo, num_requests * self.num_rounds)
        is_lost = is_stopped = False

        def watch(progress: Progress) -> bool:
            nonlocal is_lost, is_stopped
            is_lost = is_lost or progress.num_missed > most
            is_stopped = self.on_progress is not None and self.on_progress(progress)
            return is_lost or is_stopped

        plan = self.recipe.plan(self.target, self.command, schedule, rate)
        samples: list[ClusterSample] = []
        on_sample = samples.append if self.recipe.options.samples else None
        manifest, records = execute(plan, watch, on_sample)
        name = f"rate-{rate:.4g}-seed-{seed}"
        write_run(self.folder / name, manifest, records, samples)
        folders.append(name)
        if self.on_run is not None:
            self.on_run(rate, manifest, records)
        if is_stopped:
            raise InvalidRunError(STOPPED)
        against = [why for why in manifest.invalid_reasons if why not in NOT_THE_DRIVERS]
        if against:
            raise InvalidRunError("; ".join(against))
        return records, is_lost


def sweep_rates(sweep: Sweep, rates: Sequence[float], num_accelerators: int) -> SweepRecord:
    """Every rate in turn."""
    points: list[Point] = []
    for rate in rates:
        points.append(sweep.point(rate))
        record = SweepRecord(sweep.command, sweep.target.name, num_accelerators, tuple(points))
        _write(sweep.folder, record)
    return record


def search_goodput(
    sweep: Sweep, search: Search, num_accelerators: int
) -> tuple[Goodput, SweepRecord]:
    """Rates until the highest one that attains is known closely enough."""
    points: list[Point] = []
    while (rate := search.next_rate()) is not None:
        point = sweep.point(rate)
        points.append(point)
        search.update(rate, passed=point.verdict.passed)
        record = SweepRecord(
            sweep.command,
            sweep.target.name,
            num_accelerators,
            tuple(points),
            search.low,
            search.high,
        )
        _write(sweep.folder, record)
    return Goodput(search.low, search.high, num_accelerators, tuple(points)), record


def read_sweep(folder: Path) -> SweepRecord:
    """``sweep.json`` of a folder.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    path = folder / SWEEP_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=SweepRecord)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: {error}") from error


def _write(folder: Path, record: SweepRecord) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    encoded = msgspec.json.format(msgspec.json.encode(record), indent=2)
    (folder / SWEEP_FILE).write_bytes(encoded + b"\n")
