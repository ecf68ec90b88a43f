"""Which run the detailed plots show: plots of single requests would be unreadable with all rates.

One run, where one holds all targets: the fastest that a target met. Else one run of each target, at
the highest rate that all of them met; where there is none, each target's own fastest that it met,
or its slowest if it met none. Without objectives a faster run is the better one to look at. A valid
run is preferred, and of several rounds at a rate the first one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.report.drawing.scale import compact
from bench.report.figures.load_points import LoadPoint, load_points
from bench.report.runs import Side

Points = dict[str, list[LoadPoint]]


@dataclass(frozen=True, slots=True)
class Focus:
    """What is shown in detail, the rates that it belongs to, and why these."""

    sides: tuple[Side, ...]
    points: tuple[LoadPoint, ...]
    """With all rounds of the rate, in the order of the sides."""
    words: str
    """For the captions; empty where the report has nothing else."""


def focus(sides: Sequence[Side]) -> Focus:
    """The sides that are shown in detail."""
    names = list(dict.fromkeys(side.name for side in sides))
    if not names:
        return Focus((), (), "")
    together = _one_run(sides)
    if {side.name for side in together} == set(names):
        return Focus(together, _points_of(together, sides), _words_of_one(together, sides))
    by_name = {name: _known([side for side in sides if side.name == name]) for name in names}
    points = load_points([side for own in by_name.values() for side in own])
    if set(points) != set(names):  # a target without a single request has no rate
        points = {name: points[name] for name in names if name in points}
    if not points:
        return Focus(together, (), _words_of_one(together, sides))
    chosen, words = _one_each(points)
    shown = tuple(point.sides[0] for point in chosen)
    return Focus(shown, _points_of(shown, sides), words)


def _known(sides: Sequence[Side]) -> list[Side]:
    return [side for side in sides if side.run.manifest.valid] or list(sides)


def _one_run(sides: Sequence[Side]) -> tuple[Side, ...]:
    """All sides of the best run."""
    known = _known(sides)
    if known[0].slo is None:
        chosen = known[-1].run
    else:
        points = [point for own in load_points(known).values() for point in own]
        met = [point for point in points if point.attains("share")]
        best = max(met, key=lambda point: point.rate, default=None)
        chosen = best.sides[0].run if best is not None else known[0].run
    return tuple(side for side in sides if side.run is chosen)


def _one_each(points: Points) -> tuple[list[LoadPoint], str]:
    """One point of each target, and what to say of them."""
    judged = all(own[0].sides[0].slo is not None for own in points.values())
    found = {
        name: [point for point in own if not judged or point.attains("share")]
        for name, own in points.items()
    }
    rates = [{point.rate for point in own} for own in found.values()]
    if shared := set.intersection(*rates):
        rate = max(shared)
        chosen = [next(p for p in own if p.rate == rate) for own in found.values()]
        which = "met" if judged else "have"
        folders = ", ".join(_folder(point) for point in chosen)
        return chosen, (
            f"One run of each target at {compact(rate)} requests/s, the highest rate that all of "
            f"them {which} ({folders}). "
        )
    chosen = [own[-1] if own else points[name][0] for name, own in found.items()]
    told = "; ".join(_told(point) for point in chosen)
    if not judged:
        return chosen, f"Each target at its own highest rate, since they share none: {told}. "
    return chosen, (
        "Each target at the highest rate that it met itself, or else its lowest, since they have "
        f"met none in common: {told}. "
    )


def _folder(point: LoadPoint) -> str:
    """With the one above it, since rounds of two sweeps have the same names."""
    folder = point.sides[0].run.folder
    return f"{folder.parent.name}/{folder.name}" if folder.parent.name else folder.name


def _told(point: LoadPoint) -> str:
    missed = point.sides[0].slo is not None and not point.attains("share")
    told = ", not met" if missed else ""
    return f"{point.name} at {compact(point.rate)}/s ({_folder(point)}{told})"


def _words_of_one(shown: Sequence[Side], sides: Sequence[Side]) -> str:
    run = shown[0].run
    if all(side.run is run for side in sides):
        return ""
    return f"Of the run {run.folder.name}, {compact(run.rate)} requests/s. "


def _points_of(shown: Sequence[Side], sides: Sequence[Side]) -> tuple[LoadPoint, ...]:
    points = load_points(sides)
    return tuple(
        point
        for side in shown
        for point in points.get(side.name, [])
        if any(one is side for one in point.sides)
    )
