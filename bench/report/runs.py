"""Runs read back: what each of their targets did, with the colour that it has on every plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from bench.load.analysis.compare import Comparison
from bench.load.analysis.metrics import Summary, summarise
from bench.load.analysis.slo import Slo, parse_slo
from bench.load.record import MANIFEST_FILE, Manifest, RequestRecord, read_run
from bench.load.samples import ClusterSample, read_samples
from bench.load.sweep import SWEEP_FILE, SweepRecord, read_sweep
from protocol.errors import ConfigError

COMPARISON_FILE = "compare.json"


@dataclass(frozen=True, slots=True)
class Run:
    """One folder: what was asked of whom, and what came back."""

    folder: Path
    manifest: Manifest
    records: Sequence[RequestRecord]
    comparison: dict[str, Any] | None = None
    """What ``baton bench compare`` has concluded, if it made this run."""
    sweep: SweepRecord | None = None
    """The sweep that it is a round of."""
    samples: Sequence[ClusterSample] = ()
    """What the targets that are Baton clusters said of themselves on the way."""

    @property
    def rate(self) -> float:
        """Requests that the schedule held per second, of each target."""
        targets = max(1, len({record.target for record in self.records}))
        planned = self.manifest.arrival.get("rate")
        if isinstance(planned, int | float) and planned > 0:
            return float(planned)
        duration_s = max((record.intended_s for record in self.records), default=0.0)
        return len(self.records) / targets / duration_s if duration_s else 0.0


@dataclass(frozen=True, slots=True)
class Side:
    """One target in one run."""

    run: Run
    name: str
    color: int
    records: Sequence[RequestRecord]
    slo: Slo | None
    summary: Summary

    @property
    def num_accelerators(self) -> int:
        """Of the target, prefill and decode and idle ones together; 1 where nobody has said."""
        for target in self.run.manifest.targets:
            if target.get("name") == self.name and target.get("num_accelerators"):
                return int(target["num_accelerators"])
        sweep = self.run.sweep
        return sweep.num_accelerators if sweep is not None else 1

    @property
    def rate_per_accelerator(self) -> float:
        return self.run.rate / self.num_accelerators

    @property
    def samples(self) -> list[ClusterSample]:
        """What it said of itself, in order of time; nothing of a server that is not a Baton."""
        own = [sample for sample in self.run.samples if sample.target == self.name]
        return sorted(own, key=lambda sample: sample.at_s)

    @property
    def answered(self) -> list[RequestRecord]:
        """Requests that were answered in full."""
        return [record for record in self.records if record.outcome == "ok"]


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Indented, since people read it."""
    encoded = msgspec.json.format(msgspec.json.encode(comparison), indent=2)
    (folder / COMPARISON_FILE).write_bytes(encoded + b"\n")


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in ``folders``, and in the folders right below them: a sweep is one of those.

    Raises:
        ConfigError: a folder holds no run, or one that cannot be read.
    """
    runs: list[Run] = []
    origins: list[Path] = []
    for folder in folders:
        if (folder / MANIFEST_FILE).exists():
            inside = [folder]
        else:
            inside = sorted(found.parent for found in folder.glob(f"*/{MANIFEST_FILE}"))
        if not inside:
            raise ConfigError(f"{folder}: no {MANIFEST_FILE} in it, nor one folder below it")
        sweep = read_sweep(folder) if (folder / SWEEP_FILE).exists() else None
        runs += [_load(one, sweep) for one in inside]
        origins += [folder] * len(inside)
    return sorted(_told_apart(runs, origins), key=lambda run: run.rate)


def _told_apart(runs: Sequence[Run], origins: Sequence[Path]) -> list[Run]:
    """Runs whose targets have one name and one rate, but were given as different folders, are not
    rounds of one target: each gets its folder's name before its own."""
    seen: dict[tuple[str, float], Path] = {}
    is_mixed = False
    for run, origin in zip(runs, origins, strict=True):
        for record_target in {record.target for record in run.records}:
            is_mixed |= seen.setdefault((record_target, run.rate), origin) != origin
    if not is_mixed:
        return list(runs)
    return [renamed(run, origin.name) for run, origin in zip(runs, origins, strict=True)]


def renamed(run: Run, prefix: str) -> Run:
    """The run with ``prefix: `` before the names of its targets."""

    def new(name: object) -> str:
        return f"{prefix}: {name}"

    replace = msgspec.structs.replace
    targets = [{**target, "name": new(target.get("name"))} for target in run.manifest.targets]
    records = [replace(record, target=new(record.target)) for record in run.records]
    samples = [replace(sample, target=new(sample.target)) for sample in run.samples]
    manifest = replace(run.manifest, targets=targets)
    return Run(run.folder, manifest, records, None, run.sweep, samples)


def _load(folder: Path, sweep: SweepRecord | None) -> Run:
    manifest, records = read_run(folder)
    comparison = None
    if (folder / COMPARISON_FILE).exists():
        content = (folder / COMPARISON_FILE).read_bytes()
        try:
            comparison = msgspec.json.decode(content, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ConfigError(f"{folder / COMPARISON_FILE}: {error}") from error
    return Run(folder, manifest, records, comparison, sweep, read_samples(folder))


def sides_of(runs: Sequence[Run]) -> list[Side]:
    """Every target of every run, in the order of runs; the same name has the same colour."""
    colors: dict[str, int] = {}
    sides: list[Side] = []
    for run in runs:
        for name, records in _by_target(run).items():
            color = colors.setdefault(name, len(colors))
            slo = slo_of(run.manifest)
            summary = summarise(records, slo)
            sides.append(Side(run, name, color, records, slo, summary))
    return sides


def slo_of(manifest: Manifest) -> Slo | None:
    """The objectives that a run was made with."""
    if manifest.slo is None:
        return None
    if "objectives" in manifest.slo:
        return msgspec.convert(manifest.slo, Slo)
    return parse_slo(manifest.slo, MANIFEST_FILE)


def _by_target(run: Run) -> dict[str, list[RequestRecord]]:
    names = [str(target.get("name", "")) for target in run.manifest.targets]
    found: dict[str, list[RequestRecord]] = {name: [] for name in names}
    for record in run.records:
        found.setdefault(record.target, []).append(record)
    return found
