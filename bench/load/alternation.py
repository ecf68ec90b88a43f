"""Targets that take turns: block by block, the same requests to each, in the order A B B A.

1. Each block has a schedule of its own, drawn from the seed; every target gets that schedule.
2. Within a block the targets run one after the other, and in the next block in the opposite order:
   a machine that grows slower during the run is as slow for the one as for the other.
3. In the records, every target's blocks are laid end to end, so that request *i* was intended at
   the same time for all of them, and the turns of the others leave no gap.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from bench.load.analysis.compare import (
    COMPARISON_VERSION,
    CONFIDENCE,
    Comparison,
    Gate,
    Settings,
    compare,
    conclude,
)
from bench.load.analysis.validity import STOPPED
from bench.load.driving.driver import Target
from bench.load.driving.process import OnProgress
from bench.load.driving.watch import OnSample
from bench.load.planning import Recipe
from bench.load.record import Manifest, RequestRecord
from bench.load.run import execute
from bench.load.samples import ClusterSample, shifted_sample
from protocol.errors import ConfigError

SEEDS_PER_RUN = 1000  # the blocks of a run with another seed share none with this one's
OnTurn = Callable[[int, str, Manifest], None]


@dataclass(frozen=True, slots=True)
class Contest:
    """Who is compared, and how long.

    Args:
        targets: the first one is the base.
        num_accelerators: by name, where it is known.
        num_blocks: the more, the better an interval knows how much blocks differ.
        pause_s: between turns, for what is left over of the one before.
        on_sample: gets the state of whichever target is being asked, at the time of its block.
    """

    targets: Sequence[Target]
    recipe: Recipe
    num_blocks: int
    command: str = ""
    num_accelerators: dict[str, int] = field(default_factory=dict)
    pause_s: float = 0.5
    on_progress: OnProgress | None = None
    on_turn: OnTurn | None = None
    on_sample: OnSample | None = None

    def __post_init__(self) -> None:
        names = [target.name for target in self.targets]
        if len(names) < 2:
            raise ConfigError("a comparison needs two targets or more")
        if len(set(names)) < len(names):
            raise ConfigError(f"two targets have one name: {', '.join(names)}; write NAME=URL")
        if not 2 <= self.num_blocks <= SEEDS_PER_RUN:
            raise ConfigError(f"a comparison needs 2 to {SEEDS_PER_RUN} blocks")


def order_of(targets: Sequence[Target], block: int) -> list[Target]:
    """Whose turn it is, within a block."""
    return list(targets) if block % 2 == 0 else list(reversed(targets))


def alternate(contest: Contest) -> tuple[Manifest, list[RequestRecord]]:
    """Run all blocks; one manifest and all records, indexed through.

    A turn that was stopped from outside is the last one.

    Raises:
        DriverError: a driver's process has died.
    """
    manifests: list[Manifest] = []
    records: list[RequestRecord] = []
    starts: list[int] = []
    reasons: list[str] = []
    first_index, first_s = 0, 0.0
    options = contest.recipe.options
    is_stopped = False
    for block in range(contest.num_blocks):
        if is_stopped:
            break
        schedule = contest.recipe.schedule(SEEDS_PER_RUN * options.seed + block)
        starts.append(first_index)
        end_s = first_s
        for target in order_of(contest.targets, block):
            if manifests:
                time.sleep(contest.pause_s)
            plan = contest.recipe.plan(target, contest.command, schedule, None)
            on_sample = None if contest.on_sample is None else _later(contest.on_sample, first_s)
            manifest, found = execute(plan, contest.on_progress, on_sample)
            manifests.append(manifest)
            reasons += [f"block {block + 1}, {target.name}: {r}" for r in manifest.invalid_reasons]
            moved = [shifted(record, first_index, first_s) for record in found]
            records += moved
            end_s = max([end_s, *(record.finished_s or record.intended_s for record in moved)])
            if contest.on_turn is not None:
                contest.on_turn(block, target.name, manifest)
            is_stopped = STOPPED in manifest.invalid_reasons
            if is_stopped:
                break
        first_index += len(schedule.requests)
        first_s = end_s + contest.pause_s
    records.sort(key=lambda record: (record.target, record.index))
    return _joined(contest, manifests, starts, reasons), records


def _later(on_sample: OnSample, by_s: float) -> OnSample:
    """For samples of a later block."""

    def pass_on(sample: ClusterSample) -> None:
        on_sample(shifted_sample(sample, by_s))

    return pass_on


def shifted(record: RequestRecord, index: int, by_s: float) -> RequestRecord:
    """The record as of a later block."""

    def later(at: float | None) -> float | None:
        return None if at is None else at + by_s

    return msgspec.structs.replace(
        record,
        index=record.index + index,
        intended_s=record.intended_s + by_s,
        sent_s=record.sent_s + by_s,
        headers_s=later(record.headers_s),
        token_times_s=tuple(at + by_s for at in record.token_times_s),
        finished_s=later(record.finished_s),
    )


def _joined(
    contest: Contest, manifests: Sequence[Manifest], starts: Sequence[int], reasons: Sequence[str]
) -> Manifest:
    """The first one, with what belongs to all."""
    first = manifests[0]
    by_name: dict[str, dict[str, Any]] = {}
    for manifest in manifests:
        for target in manifest.targets:
            by_name.setdefault(target["name"], target)
    targets = [dict(by_name[target.name]) for target in contest.targets]
    for target in targets:
        if target["name"] in contest.num_accelerators:
            target["num_accelerators"] = contest.num_accelerators[target["name"]]
    lag = {
        name: max(manifest.send_lag.get(name, 0.0) for manifest in manifests)
        for name in first.send_lag
    }
    driver = {**first.driver, "block_starts": list(starts), "order": "ABBA"}
    watched = [m.driver["samples"] for m in manifests if "samples" in m.driver]
    if watched:
        counts = {name: sum(one[name] for one in watched) for name in ("num_samples", "num_missed")}
        driver["samples"] = {**watched[0], **counts}
    hashes = "".join(dict.fromkeys(manifest.schedule_sha256 for manifest in manifests))
    return msgspec.structs.replace(
        first,
        seed=contest.recipe.options.seed,
        targets=targets,
        duration_s=sum(manifest.duration_s for manifest in manifests),
        schedule_sha256=_sha256(hashes),
        valid=not reasons,
        invalid_reasons=list(reasons),
        send_lag=lag,
        driver=driver,
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def conclusion(
    contest: Contest,
    manifest: Manifest,
    records: Sequence[RequestRecord],
    gates: Sequence[Gate],
    *,
    strict: bool = False,
) -> Comparison:
    """The ratios of a contest, and whether they pass; an invalid run has neither."""
    names = [target.name for target in contest.targets]
    settings = Settings(seed=manifest.seed)
    pairs = compare(records, names, manifest.driver["block_starts"], contest.recipe.slo, settings)
    verdict, reasons = conclude(pairs, gates, strict=strict)
    if not manifest.valid:
        verdict, reasons = "invalid", tuple(manifest.invalid_reasons)
    return Comparison(
        COMPARISON_VERSION,
        manifest.metrics_version,
        names[0],
        contest.num_blocks,
        CONFIDENCE,
        settings.tolerance,
        settings.seed,
        tuple(pairs),
        verdict,
        reasons,
    )
