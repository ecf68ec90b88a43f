"""Plots as SVG that takes its colours from the page, so that one drawing serves both themes.

Every drawing has its own width in pixels and is not scaled up, so a label has the size of the text
around it; the page holds a wide and a narrow drawing of each plot and shows the one that fits.
A drawing is also a file of its own (``file_of``), in the page's light colours.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

from bench.report.drawing.layout import (
    LINE_HEIGHT,
    Frame,
    clip_text,
    frame_of,
    is_flat_rule,
    legend_rows,
    spread,
    text_width,
    thin_labels,
    upright_rules,
)
from bench.report.drawing.markup import node
from bench.report.drawing.plot import (
    NEUTRAL,
    Band,
    Dots,
    Lanes,
    LaneText,
    Line,
    Plot,
    Rule,
    Spans,
    Whiskers,
)
from bench.report.drawing.scale import LOG_FLOOR, tick_text, ticks

WIDE, NARROW = 720, 360
NUM_COLORS = 10
NUM_RAMP_COLORS = 5
TITLE_HEIGHT, MARGIN = 34, 12  # of a file of its own
BAR_SHARE = 0.62  # of a lane's height
PAGE_STYLE = Path(__file__).parent.parent / "page.css"
_DASHES = {"": None, "dash": "6 4", "dot": "1.5 3.5"}


class Canvas:
    """An SVG element that grows."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.root = node(
            "svg",
            viewBox=f"0 0 {width:g} {height:g}",
            width=width,
            height=height,
            role="img",
            aria_label=title,
        )

    def add(self, tag: str, **attributes: str | float | None) -> None:
        self.root.append(node(tag, **attributes))

    def text(self, x: float, y: float, text: str, class_: str, anchor: str = "start") -> None:
        self.root.append(node("text", text, x=x, y=y, class_=class_, text_anchor=anchor))


def draw(plot: Plot, width: int = WIDE) -> Element:
    """The plot as one SVG element."""
    frame = frame_of(plot, width)
    canvas = Canvas(width, frame.height, plot.title)
    _legend(canvas, plot, width)
    _axes(canvas, plot, frame)
    for layer in plot.layers:
        match layer:
            case Band():
                _band(canvas, layer, frame)
            case Line():
                _line(canvas, layer, frame)
            case Dots():
                _dots(canvas, layer, frame)
            case Spans():
                _spans(canvas, layer, frame)
            case Whiskers():
                _whiskers(canvas, layer, frame)
            case LaneText():
                for lane, x, text in layer.texts:
                    y = frame.lane(lane) + 4
                    canvas.text(frame.x(x) + 7, y, text, "tick")
            case Rule():
                pass
    _rules(canvas, plot, frame)
    return canvas.root


def color_class(color: int) -> str:
    return "cn" if color == NEUTRAL else f"c{color % NUM_COLORS}"


def _legend(canvas: Canvas, plot: Plot, width: int) -> None:
    rows = legend_rows(plot, width)
    for row, entries in enumerate(rows):
        y = 14.0 + row * LINE_HEIGHT
        for x, entry in entries:
            _key(canvas, entry, x, y)
            canvas.text(x + 24, y, clip_text(entry.name, width - x - 24), "legend")
    if plot.ramp:
        y = 14.0 + len(rows) * LINE_HEIGHT
        canvas.text(0, y, f"{plot.ramp}: 0 %", "legend")
        x = text_width(f"{plot.ramp}: 0 %") + 6
        for shade in range(NUM_RAMP_COLORS):
            at = x + 14 * shade
            canvas.add("rect", x=at, y=y - 9, width=14, height=9, class_=f"bar r{shade}")
        canvas.text(x + 14 * NUM_RAMP_COLORS + 6, y, "100 %", "legend")


def _key(canvas: Canvas, entry: Line | Dots | Spans, x: float, y: float) -> None:
    """The small sample in front of a legend's word."""
    color = color_class(entry.color)
    match entry:
        case Line():
            canvas.add(
                "line",
                x1=x,
                x2=x + 18,
                y1=y - 4,
                y2=y - 4,
                class_=f"line {color}",
                stroke_dasharray=_DASHES[entry.dashes],
            )
        case Dots():
            hollow = bool(entry.dots) and all(dot.hollow for dot in entry.dots)
            kind = "ring" if hollow else "dot"
            canvas.add("circle", cx=x + 9, cy=y - 4, r=3.6, class_=f"{kind} {color}")
        case Spans():
            canvas.add("rect", x=x + 3, y=y - 10, width=12, height=11, rx=2, class_=f"bar {color}")


def _axes(canvas: Canvas, plot: Plot, frame: Frame) -> None:
    if isinstance(plot.y, Lanes):
        for lane, name in enumerate(plot.y.names):
            if frame.names_above:
                shown = clip_text(name, frame.width - frame.left)
                canvas.text(frame.left, frame.lane(lane) - 15, shown, "tick")
                continue
            shown = clip_text(name, frame.left - 10)
            canvas.text(frame.left - 8, frame.lane(lane) + 4, shown, "tick", "end")
    else:
        values = ticks(frame.y, max(3, int((frame.bottom - frame.top) / 44)))
        for value in values:
            at = frame.y(value)
            canvas.add("line", x1=frame.left, x2=frame.right, y1=at, y2=at, class_="grid")
            label = tick_text(value, plot.y.unit, values)
            canvas.text(frame.left - 8, at + 4, label, "tick", "end")
    values = ticks(frame.x, max(3, int((frame.right - frame.left) / 64)))
    labels = [(frame.x(value), tick_text(value, plot.x.unit, values)) for value in values]
    for value in values:
        at = frame.x(value)
        canvas.add("line", x1=at, x2=at, y1=frame.top, y2=frame.bottom, class_="grid")
    for at, label in thin_labels(labels, frame.width):
        canvas.text(at, frame.bottom + 16, label, "tick", "middle")
    canvas.add(
        "line", x1=frame.left, x2=frame.right, y1=frame.bottom, y2=frame.bottom, class_="axis"
    )
    canvas.text(frame.right, frame.bottom + 34, plot.x.label, "label", "end")
    if plot.y.label:
        above = LINE_HEIGHT * len(upright_rules(plot))
        canvas.text(0, frame.top - 14 - above, plot.y.label, "label")


def _band(canvas: Canvas, band: Band, frame: Frame) -> None:
    if len(band.points) == 1:  # one point has an interval, too
        x, low, high = band.points[0]
        points = [(frame.x(x) + dx, frame.y(y)) for dx, y in ((-4, low), (-4, high))]
        points += [(frame.x(x) + dx, frame.y(y)) for dx, y in ((4, high), (4, low))]
    else:
        points = [(frame.x(x), frame.y(high)) for x, _, high in band.points]
        points += [(frame.x(x), frame.y(low)) for x, low, _ in reversed(band.points)]
    written = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    canvas.add("polygon", points=written, class_=f"band {color_class(band.color)}")


def _line(canvas: Canvas, line: Line, frame: Frame) -> None:
    pixels = [(frame.x(x), frame.y(y)) for x, y in line.points]
    path = ""
    for index, (x, y) in enumerate(pixels):
        if index and line.steps:
            path += f"H{x:.1f}"
        path += f"{'L' if index else 'M'}{x:.1f} {y:.1f}"
    color = color_class(line.color)
    canvas.add("path", d=path, class_=f"line {color}", stroke_dasharray=_DASHES[line.dashes])
    if not line.dots:
        return
    for index, (x, y) in enumerate(pixels):
        tip = line.tips[index] if index < len(line.tips) else ""
        canvas.add("circle", cx=x, cy=y, r=3.5, class_=f"dot solid {color}", data_tip=tip or None)


def _dots(canvas: Canvas, dots: Dots, frame: Frame) -> None:
    many = len(dots.dots) > 200
    for dot in dots.dots:
        if frame.x.log and dot.x < LOG_FLOOR:
            continue
        color = color_class(dots.color)
        if dot.shade is not None:
            color = f"r{min(NUM_RAMP_COLORS - 1, int(dot.shade * NUM_RAMP_COLORS))}"
        canvas.add(
            "circle",
            cx=round(frame.x(dot.x), 1),
            cy=round(frame.y(dot.y), 1),
            r=2.6 if many else 3.6,
            class_=f"{'ring' if dot.hollow else 'dot'} {color}",
            data_tip=dot.tip or None,
        )


def _spans(canvas: Canvas, spans: Spans, frame: Frame) -> None:
    height = min(18.0, frame.lane_height * BAR_SHARE)
    for span in spans.spans:
        start, end = frame.x(span.start), frame.x(span.end)
        canvas.add(
            "rect",
            x=round(start, 2),
            y=round(frame.lane(span.lane) - height / 2, 2),
            width=round(max(0.6, end - start), 2),
            height=round(height, 2),
            rx=1.5 if height > 8 else 0.0,
            class_=f"bar {color_class(spans.color)}",
            data_tip=span.tip or None,
        )


def _whiskers(canvas: Canvas, whiskers: Whiskers, frame: Frame) -> None:
    for lane, low, high in whiskers.points:
        y, left, right = frame.lane(lane), frame.x(low), frame.x(high)
        path = f"M{left:.1f} {y:.1f}H{right:.1f}M{left:.1f} {y - 5:.1f}V{y + 5:.1f}"
        canvas.add("path", d=f"{path}M{right:.1f} {y - 5:.1f}V{y + 5:.1f}", class_="whisker")


def _rules(canvas: Canvas, plot: Plot, frame: Frame) -> None:
    """Rules lie over the marks, and their labels keep apart from each other."""
    flat = [layer for layer in plot.layers if is_flat_rule(layer)]
    wanted = [frame.y(rule.at) + 4 for rule in flat]
    for rule, y in zip(flat, spread(wanted, LINE_HEIGHT, 0.0), strict=True):
        at = frame.y(rule.at)
        canvas.add("line", x1=frame.left, x2=frame.right, y1=at, y2=at, class_="rule")
        canvas.text(frame.right + 5, y, rule.label, "rule-text")
    for row, rule in enumerate(upright_rules(plot)):
        at, y = frame.x(rule.at), frame.top - 6 - row * LINE_HEIGHT
        canvas.add("line", x1=at, x2=at, y1=y + 2, y2=frame.bottom, class_="rule")
        half = text_width(rule.label) / 2
        middle = min(max(at, half), frame.width - half)
        canvas.text(middle, y, rule.label, "rule-text", "middle")


# ---- a file of its own -------------------------------------------------------------------------


def file_of(plot: Plot) -> str:
    """The plot as an SVG document with its title, for slides and for documents."""
    drawing = draw(plot)
    height = float(drawing.get("height", "0")) + TITLE_HEIGHT
    drawing.set("xmlns", "http://www.w3.org/2000/svg")
    width = WIDE + 2 * MARGIN
    drawing.set("viewBox", f"{-MARGIN} {-TITLE_HEIGHT} {width} {height:g}")
    drawing.set("width", f"{width}")
    drawing.set("height", f"{height:g}")
    drawing.insert(0, node("style", "\n".join(_plain_rules())))
    drawing.insert(
        1, node("rect", x=-MARGIN, y=-TITLE_HEIGHT, width=width, height=height, fill="#fff")
    )
    drawing.insert(2, node("text", plot.title, x=0, y=-12, style="font-weight: bold"))
    return tostring(drawing, encoding="unicode")


def _plain_rules() -> Iterator[str]:
    """The page's rules for drawings without variables: few programs but browsers know those."""
    style = PAGE_STYLE.read_text(encoding="utf-8")
    light = dict(re.findall(r"--(\w+): light-dark\((#\w+),", style))
    marks = [name for name in light if re.fullmatch(r"[cr](\d|n)", name)]
    for selectors, rule in re.findall(r"^svg (.+) \{ (.+) \}$", style, re.MULTILINE):
        selector = selectors.replace("svg ", "")
        plain = re.sub(r"var\(--(\w+)\)", lambda found: light.get(found[1], found[0]), rule)
        plain = plain.replace("var(--sans)", "sans-serif")
        if "var(--c)" not in plain:
            yield f"{selector} {{ {plain} }}"
            continue
        for mark in marks:
            yield f"{selector}.{mark} {{ {plain.replace('var(--c)', light[mark])} }}"
