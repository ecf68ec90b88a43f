"""Where things stand in a drawing: margins from the width of labels, legends in rows, no overlap.

Nothing here knows the reader's fonts: widths are estimated, generously, for a sans-serif of 12 px.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

from bench.report.drawing.plot import (
    Dots,
    Lanes,
    LaneText,
    Layer,
    Line,
    Plot,
    Rule,
    Spans,
    legend,
    x_values,
    y_values,
)
from bench.report.drawing.scale import Scale, scale, tick_text, ticks

LINE_HEIGHT = 17
KEY_WIDTH = 24  # of a legend's sample
GAP = 18  # between two entries of a legend
PLOT_HEIGHT = 240.0
MAX_TALL_LANES = 24
ABOVE_SHARE = 0.7  # of a lane's height, where its bar is below its name
_NARROW_CHARACTERS = frozenset("iljtfr.,:;|!'()[] ")
_BROAD_CHARACTERS = frozenset("mwMWGOQD%@#&")


def text_width(text: str) -> float:
    """Pixels, rather too many than too few."""
    narrow = sum(character in _NARROW_CHARACTERS for character in text)
    broad = sum(character in _BROAD_CHARACTERS for character in text)
    wide = sum(ord(character) > 0x2E80 for character in text)
    return 4.7 * narrow + 10.8 * broad + 12.5 * wide + 7.4 * (len(text) - narrow - broad - wide)


def clip_text(text: str, width: float) -> str:
    """With an ellipsis where it would be wider."""
    if text_width(text) <= width:
        return text
    while text and text_width(text + "…") > width:
        text = text[:-1]
    return text + "…"


@dataclass(frozen=True, slots=True)
class Frame:
    """The rectangle that marks are drawn in, and the way from values to pixels."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x: Scale
    y: Scale
    lane_height: float = 0.0
    names_above: bool = False
    """Whether a lane's name stands over its bar, where it is too wide to stand before it."""

    def lane(self, index: int) -> float:
        """The middle of a lane."""
        return self.y(float(index))


def frame_of(plot: Plot, width: int) -> Frame:
    """The frame of a plot in a drawing of ``width`` pixels."""
    num_rows = len(legend_rows(plot, width)) + bool(plot.ramp)
    num_rows += len(upright_rules(plot))
    top = num_rows * LINE_HEIGHT + (34.0 if plot.y.label else 14.0)
    names_above = _has_names_above(plot, width)
    lane_height = _lane_height(plot, names_above=names_above)
    if isinstance(plot.y, Lanes):
        height = max(1, len(plot.y.names)) * lane_height
        share = ABOVE_SHARE if names_above else 0.5
        y = Scale(-share, max(1, len(plot.y.names)) - share, top, top + height)
        left = 2.0 if names_above else min(0.4 * width, _names_width(plot.y))
    else:
        height = PLOT_HEIGHT if width > 500 else 0.85 * PLOT_HEIGHT
        y = scale(plot.y, y_values(plot.layers), top + height, top)
        values = ticks(y, max(3, int(height / 44)))
        labels = [tick_text(value, plot.y.unit, values) for value in values]
        left = max(plot.gutter, max((text_width(label) for label in labels), default=0.0) + 12)
    right = width - _right_margin(plot, width)
    x = scale(plot.x, x_values(plot.layers), left, right)
    bottom = top + height
    return Frame(width, bottom + 42, left, right, top, bottom, x, y, lane_height, names_above)


def _names_width(lanes: Lanes) -> float:
    return max((text_width(name) for name in lanes.names), default=0.0) + 12


def _has_names_above(plot: Plot, width: int) -> bool:
    if not isinstance(plot.y, Lanes) or len(plot.y.names) > MAX_TALL_LANES:
        return False
    return _names_width(plot.y) > 0.36 * width


def _lane_height(plot: Plot, *, names_above: bool) -> float:
    if not isinstance(plot.y, Lanes):
        return 0.0
    if names_above:
        return 46.0
    return 28.0 if len(plot.y.names) <= MAX_TALL_LANES else 14.0


def _right_margin(plot: Plot, width: int) -> float:
    texts = [
        text for layer in plot.layers if isinstance(layer, LaneText) for _, _, text in layer.texts
    ]
    texts += [layer.label for layer in plot.layers if is_flat_rule(layer)]
    return min(0.4 * width, max((text_width(text) + 10 for text in texts), default=16.0))


def upright_rules(plot: Plot) -> list[Rule]:
    """Each has a row of its own above the frame for its label."""
    return [layer for layer in plot.layers if isinstance(layer, Rule) and layer.vertical]


def is_flat_rule(layer: Layer) -> TypeGuard[Rule]:
    """Whether it goes across: its label stands in the right margin."""
    return isinstance(layer, Rule) and not layer.vertical


def legend_rows(plot: Plot, width: int) -> list[list[tuple[float, Line | Dots | Spans]]]:
    """(x, entry) by row; none when there is only one thing to name."""
    entries = legend(plot.layers)
    if len(entries) < 2:
        return []
    rows: list[list[tuple[float, Line | Dots | Spans]]] = [[]]
    x = 0.0
    for entry in entries:
        own = KEY_WIDTH + text_width(entry.name)
        if rows[-1] and x + own > width:
            rows.append([])
            x = 0.0
        rows[-1].append((x, entry))
        x += own + GAP
    return rows


def spread(wanted: Sequence[float], gap: float, lowest: float) -> list[float]:
    """Positions near the wanted ones, in the same order, at least ``gap`` apart."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = [0.0] * len(wanted)
    at = lowest
    for index in order:
        placed[index] = max(at, wanted[index])
        at = placed[index] + gap
    return placed


def thin_labels(labels: Sequence[tuple[float, str]], width: float) -> list[tuple[float, str]]:
    """Without those that would touch the one before, and inside the drawing."""
    kept: list[tuple[float, str]] = []
    end = -1e9
    for at, text in labels:
        half = text_width(text) / 2
        at = min(max(at, half), width - half)
        if at - half >= end + 6:
            kept.append((at, text))
            end = at + half
    return kept
