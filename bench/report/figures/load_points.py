"""Rates of a target, each with all the rounds that were run at it."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from bench.load.analysis.intervals import Share, share_of
from bench.load.analysis.metrics import distribution
from bench.load.analysis.slo import Objective, tpot_of
from bench.load.record import CANCELLED, RequestRecord
from bench.report.runs import Side


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """One target at one rate: one run, or the rounds of a sweep with other seeds."""

    name: str
    color: int
    rate: float
    rate_per_accelerator: float
    sides: tuple[Side, ...]

    def share(self, part: str) -> Share:
        """How many met their objective for the first token ("TTFT"), for the others ("TPOT"), or
        all of them ("joint")."""
        return share_of([hit for _, hit in self._hits(part)])

    def by_kind(self) -> dict[str, Share]:
        """The joint share of each kind of request."""
        hits: dict[str, list[bool]] = {}
        for record, hit in self._hits("joint"):
            hits.setdefault(record.kind, []).append(hit)
        return {kind: share_of(series) for kind, series in hits.items()}

    def _hits(self, part: str) -> list[tuple[RequestRecord, bool]]:
        """Round after round, so that neighbours in the series are neighbours in time."""
        found: list[tuple[RequestRecord, bool]] = []
        for side in self.sides:
            for record in sorted(side.records, key=lambda record: record.intended_s):
                if record.outcome != CANCELLED:
                    found.append((record, _judge(part, self.objective(record.kind), record)))
        return found

    def objective(self, kind: str) -> Objective:
        slo = self.sides[0].slo
        assert slo is not None
        return slo.of(kind)

    @property
    def target(self) -> float:
        """The share that has to meet its objectives: the strictest kind's."""
        kinds = {record.kind for side in self.sides for record in side.records}
        return max(self.objective(kind).target for kind in kinds)

    def attains(self, end: str) -> bool:
        """Whether every kind's ``share``, or the ``low`` or ``high`` end of it, is its target."""
        return all(
            getattr(share, end) >= self.objective(kind).target
            for kind, share in self.by_kind().items()
        )

    @property
    def median_tpot_s(self) -> float | None:
        values = [tpot_of(record) for side in self.sides for record in side.answered]
        return distribution([value for value in values if value is not None]).p50

    @property
    def tokens_per_s(self) -> float:
        """Output tokens, per accelerator."""
        return fmean(
            side.summary.throughput.output_tokens / side.num_accelerators for side in self.sides
        )


def _judge(part: str, objective: Objective, record: RequestRecord) -> bool:
    if part == "TTFT":
        return objective.ttft_met(record)
    return objective.tpot_met(record) if part == "TPOT" else objective.met(record)


def load_points(sides: Sequence[Side]) -> dict[str, list[LoadPoint]]:
    """By target, each by rising rate; sides without a request are left out."""
    grouped: dict[tuple[str, float], list[Side]] = {}
    for side in sides:
        if side.records:
            grouped.setdefault((side.name, round(side.run.rate, 6)), []).append(side)
    found: dict[str, list[LoadPoint]] = {}
    for (name, rate), own in sorted(grouped.items(), key=lambda item: item[0][1]):
        per_accelerator = own[0].rate_per_accelerator
        point = LoadPoint(name, own[0].color, rate, per_accelerator, tuple(own))
        found.setdefault(name, []).append(point)
    return {
        name: found[name] for name in dict.fromkeys(side.name for side in sides) if name in found
    }
