"""A comparison as a plot: ratios with their intervals around 1."""

from typing import Any

from bench.report.drawing.plot import (
    NEUTRAL,
    Axis,
    Dot,
    Dots,
    Lanes,
    LaneText,
    Plot,
    Rule,
    Whiskers,
)

COLORS = {"better": 2, "worse": 1, "same": NEUTRAL, "unclear": NEUTRAL}


def ratio_plots(comparison: dict[str, Any]) -> list[Plot]:
    """One per pair of targets."""
    return [_ratios(number, pair) for number, pair in enumerate(comparison.get("pairs", []))]


def _ratios(number: int, pair: dict[str, Any]) -> Plot:
    rows = [
        row
        for row in pair.get("rows", [])
        if (row.get("ratio") or 0.0) > 0.0 and row["low"] > 0.0 and not row.get("is_difference")
    ]
    found: dict[str, list[Dot]] = {}
    for lane, row in enumerate(rows):
        verdict = str(row.get("verdict", "unclear"))
        tip = f"{row['name']}: {row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        found.setdefault(verdict, []).append(
            Dot(row["ratio"], float(lane), f"{tip}, {verdict}", hollow=verdict == "unclear")
        )
    title = f"{pair.get('target')} against {pair.get('base')}"
    return Plot(
        f"ratios-{number}",
        title,
        Axis(f"ratio, {title}", log=True),
        Lanes(tuple(str(row["name"]) for row in rows)),
        (
            Whiskers(tuple((lane, row["low"], row["high"]) for lane, row in enumerate(rows))),
            *(
                Dots(verdict, COLORS.get(verdict, NEUTRAL), tuple(dots))
                for verdict, dots in found.items()
            ),
            LaneText(
                tuple((lane, row["high"], f"{row['ratio']:.2f}") for lane, row in enumerate(rows))
            ),
            Rule(1.0, "no difference", vertical=True),
        ),
        "Left of the line is smaller, that is faster. Hollow: the interval does not say which.",
        tab=f"ratios: {title}",
    )
