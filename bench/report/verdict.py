"""Whether the runs of a report may be believed, and why not."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.load.analysis.validity import NOT_THE_DRIVERS, STOPPED
from bench.report.runs import Run


@dataclass(frozen=True, slots=True)
class Verdict:
    """VALID, or INVALID with at least one reason. Notes do not invalidate."""

    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    is_audited: bool = True
    """False where a run is of another harness, which has not told how it kept its schedule."""

    @property
    def is_valid(self) -> bool:
        return not self.reasons and self.is_audited

    @property
    def word(self) -> str:
        if self.reasons:
            return "INVALID"
        return "VALID" if self.is_audited else "UNAUDITED"


def judge(runs: Sequence[Run]) -> Verdict:
    """One verdict over all runs: one invalid run makes the report invalid, and is named."""
    reasons: list[str] = []
    notes: list[str] = []
    for run in runs:
        where = f"{run.folder.name}: " if len(runs) > 1 else ""
        reasons += [where + reason for reason in _reasons(run)]
        notes += [note for note in _notes(run) if note not in notes]
    versions = sorted({run.manifest.metrics_version for run in runs})
    if len(versions) > 1:
        reasons.append(f"metrics of versions {', '.join(versions)} cannot be compared")
    is_audited = not any(_is_imported(run) for run in runs)
    return Verdict(tuple(_grouped(reasons, len(runs))), tuple(notes), is_audited)


def _reasons(run: Run) -> list[str]:
    manifest = run.manifest
    found = [] if _is_imported(run) else list(manifest.invalid_reasons)
    if run.sweep is not None:  # it may overload the server, and end a round that is lost
        found = [reason for reason in found if reason not in NOT_THE_DRIVERS]
    if not manifest.valid and not manifest.invalid_reasons:
        found.append("the run was marked invalid without a reason")
    if not run.records:
        found.append("no request was recorded")
    return found


def _notes(run: Run) -> list[str]:
    found: list[str] = []
    driver = run.manifest.driver
    if _is_cut_short(run):
        found.append(
            "Rounds whose target was out of reach were ended early; what they had not sent counts "
            "as missed."
        )
    if _is_imported(run):
        found += run.manifest.invalid_reasons
    if driver.get("loop") == "closed":
        found.append(
            "Closed loop: a slow server is sent less, so its stalls are understated. These figures "
            "are not latencies under a given load."
        )
    if driver.get("clock") == "virtual":
        found.append("Simulated: the clock is virtual, and no server was measured.")
    if run.manifest.slo is None:
        found.append("No SLO was given: attainment and goodput are not reported.")
    return found


def _is_imported(run: Run) -> bool:
    return "imported_from" in run.manifest.driver


def _is_cut_short(run: Run) -> bool:
    return run.sweep is not None and STOPPED in run.manifest.invalid_reasons


def _grouped(reasons: Sequence[str], num_runs: int) -> list[str]:
    """A reason that all runs share is told once."""
    bare: dict[str, int] = {}
    for reason in reasons:
        words = reason.partition(": ")[2] if num_runs > 1 else reason
        bare[words] = bare.get(words, 0) + 1
    found: list[str] = []
    for reason in reasons:
        words = reason.partition(": ")[2] if num_runs > 1 else reason
        told = f"all runs: {words}" if num_runs > 1 and bare[words] == num_runs else reason
        if told not in found:
            found.append(told)
    return found
