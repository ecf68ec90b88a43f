"""A plot as data: what is drawn, not how. ``svg.py`` draws it.

Colours are indices into a palette, so that a target has one colour on every plot of a report; a
mark's ``tip`` is what is shown of it on request and must need no colour to be understood.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Unit = Literal["", "s", "share", "tokens", "rate"]
Dashes = Literal["", "dash", "dot"]
NEUTRAL = -1  # a colour that belongs to no target


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of numbers; limits that are None come from the marks."""

    label: str
    unit: Unit = ""
    log: bool = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Lanes:
    """A vertical axis of names, the first one on top."""

    names: tuple[str, ...]
    label: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """Straight pieces between points, or steps that rise at them."""

    name: str
    color: int
    points: tuple[tuple[float, float], ...]
    dashes: Dashes = ""
    steps: bool = False
    dots: bool = False
    tips: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Band:
    """(x, low, high): an interval around a line; it has no entry in the legend."""

    color: int
    points: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, slots=True)
class Dot:
    """``shade`` from 0 to 1 chooses a colour of the sequential ramp instead of the palette."""

    x: float
    y: float
    tip: str = ""
    shade: float | None = None
    hollow: bool = False


@dataclass(frozen=True, slots=True)
class Dots:
    """Unconnected points."""

    name: str
    color: int
    dots: tuple[Dot, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """A line across the whole plot at one value, with its label beside it."""

    at: float
    label: str
    vertical: bool = False


@dataclass(frozen=True, slots=True)
class Span:
    """A bar in a lane from ``start`` to ``end``."""

    lane: int
    start: float
    end: float
    tip: str = ""


@dataclass(frozen=True, slots=True)
class Spans:
    """All bars of one name and colour."""

    name: str
    color: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Whiskers:
    """(lane, low, high): intervals of bars."""

    points: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True, slots=True)
class LaneText:
    """(lane, x, text): words to the right of a bar."""

    texts: tuple[tuple[int, float, str], ...]


Layer = Line | Band | Dots | Rule | Spans | Whiskers | LaneText


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure: its key names its file, its note says what to read from it and what not."""

    key: str
    title: str
    x: Axis
    y: Axis | Lanes
    layers: tuple[Layer, ...]
    note: str = ""
    tab: str = ""
    """Its name among the plots of the same panel."""
    ramp: str = ""
    """What the sequential colours of dots mean, from 0 to 1."""
    table: tuple[tuple[str, ...], ...] = ()
    """The same figures to read; the first row is the head."""
    gutter: float = 0.0
    """Pixels left of the frame, at least: plots below one another then share an axis."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to see: rules alone say nothing."""
        return not any(_has_marks(layer) for layer in self.layers)


def _has_marks(layer: Layer) -> bool:
    match layer:
        case Line() | Band():
            return bool(layer.points)
        case Dots():
            return bool(layer.dots)
        case Spans():
            return bool(layer.spans)
        case _:
            return False


def x_values(layers: Sequence[Layer]) -> list[float]:
    """Every x that must be inside the plot."""
    found: list[float] = []
    for layer in layers:
        match layer:
            case Line() | Band():
                found += [point[0] for point in layer.points]
            case Dots():
                found += [dot.x for dot in layer.dots]
            case Spans():
                found += [at for span in layer.spans for at in (span.start, span.end)]
            case Whiskers():
                found += [at for _, low, high in layer.points for at in (low, high)]
            case Rule(vertical=True):
                found.append(layer.at)
            case _:
                pass
    return found


def y_values(layers: Sequence[Layer]) -> list[float]:
    """Every y that must be inside the plot."""
    found: list[float] = []
    for layer in layers:
        match layer:
            case Line():
                found += [point[1] for point in layer.points]
            case Band():
                found += [at for _, low, high in layer.points for at in (low, high)]
            case Dots():
                found += [dot.y for dot in layer.dots]
            case Rule(vertical=False):
                found.append(layer.at)
            case _:
                pass
    return found


def legend(layers: Sequence[Layer]) -> list[Line | Dots | Spans]:
    """One layer per named thing, in order of appearance."""
    seen: dict[str, Line | Dots | Spans] = {}
    for layer in layers:
        if isinstance(layer, Line | Dots | Spans) and layer.name:
            seen.setdefault(layer.name, layer)
    return list(seen.values())
