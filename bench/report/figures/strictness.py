"""Attainment against the strictness of the objectives, at a fixed rate."""

from collections.abc import Sequence
from dataclasses import replace

from bench.load.analysis.intervals import Share
from bench.load.analysis.slo import Slo
from bench.report.drawing.plot import Axis, Band, Layer, Line, Plot, Rule
from bench.report.drawing.scale import between, compact
from bench.report.figures.load import PARTS, Rows
from bench.report.figures.load_points import LoadPoint

FACTORS = tuple(2.0 ** (step / 4) for step in range(-8, 9))  # 0.25 to 4; 1 is among them
MARKED = (0.9, 0.99)  # what papers and operators ask for
IN_TABLE = (0.25, 0.5, 1.0, 2.0, 4.0)


def attainment_by_scale(points: Sequence[LoadPoint]) -> Plot:
    """Share of requests that would have met objectives ``factor`` times as long.

    Args:
        points: one rate of each target, with all its rounds.
    """
    judged = [point for point in points if _has_deadlines(point.sides[0].slo)]
    layers: list[Layer] = []
    rows: Rows = [("target", "bounds times", "joint", "interval", "TTFT only", "TPOT only")]
    for point in judged:
        scaled = [_scaled(point, factor) for factor in FACTORS]
        joint = [one.share("joint") for one in scaled]
        alone = {part: [one.share(part) for one in scaled] for part, _ in PARTS}
        layers += _curves(point, joint, alone)
        for index, factor in enumerate(FACTORS):
            if factor in IN_TABLE:
                own = [shares[index] for shares in alone.values()]
                rows.append(_row(point, factor, joint[index], own))
    targets = {point.target for point in judged}
    for share in sorted({*MARKED, *targets}):
        words = f"target {100 * share:.4g} %" if share in targets else f"{100 * share:.4g} %"
        layers.append(Rule(share, words))
    layers.append(Rule(1.0, "as promised", vertical=True))
    rates = ", ".join(dict.fromkeys(f"{compact(point.rate)}/s" for point in judged))
    return Plot(
        "slo-scale",
        f"SLO attainment against the scale of the objectives, at {rates}",
        Axis("all bounds of the objectives, times", log=True, low=0.2, high=5.0),
        Axis("share of requests within them", "share", low=0.0, high=1.0),
        tuple(layers) if judged else (),
        "Left of 1 the objectives are tighter than promised, right of it looser. Where a curve "
        "crosses a line says how much tighter they could be, or would have to be looser, at this "
        "rate. A failed request misses at every scale. The band is the 95 % interval of the joint "
        "share (Wilson, for the effective number of independent requests).",
        table=tuple(rows) if judged else (),
    )


def _has_deadlines(slo: Slo | None) -> bool:
    if slo is None:
        return False
    bounds = [(one.ttft, one.tpot_s, one.e2e) for one in slo.objectives.values()]
    return any(bound is not None for own in bounds for bound in own)


def _scaled(point: LoadPoint, factor: float) -> LoadPoint:
    sides = [
        replace(side, slo=None if side.slo is None else side.slo.scaled(factor))
        for side in point.sides
    ]
    return replace(point, sides=tuple(sides))


def _curves(point: LoadPoint, joint: Sequence[Share], alone: dict[str, list[Share]]) -> list[Layer]:
    name, color = point.name, point.color
    pairs = list(zip(FACTORS, joint, strict=True))
    tips = tuple(f"{name}, bounds times {compact(factor)}: {share}" for factor, share in pairs)
    layers: list[Layer] = [
        Band(color, tuple((factor, share.low, share.high) for factor, share in pairs)),
        Line(
            f"{name}, joint",
            color,
            tuple((factor, share.share) for factor, share in pairs),
            dots=True,
            tips=tips,
        ),
    ]
    for part, dashes in PARTS:
        shares = zip(FACTORS, alone[part], strict=True)
        curve = tuple((factor, share.share) for factor, share in shares)
        layers.append(Line(f"{name}, {part} only", color, curve, dashes))
    return layers


def _row(point: LoadPoint, factor: float, joint: Share, alone: Sequence[Share]) -> tuple[str, ...]:
    return (
        point.name,
        compact(factor),
        f"{joint.share:.1%}",
        between(joint.low, joint.high, "share"),
        *(f"{share.share:.1%}" for share in alone),
    )
