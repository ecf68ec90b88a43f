"""The same plots as PNG files, by matplotlib: for slides and for documents."""

from pathlib import Path
from typing import TYPE_CHECKING

from bench.report.plot import (
    NEUTRAL,
    Axis,
    Band,
    Dots,
    Lanes,
    LaneText,
    Layer,
    Line,
    Plot,
    Rule,
    Spans,
    Whiskers,
    legend,
    x_values,
    y_values,
)
from bench.report.scale import LOG_FLOOR, scale, tick_text, ticks
from protocol.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = (  # of the page's light theme
    "#1f6cb0",
    "#c2500a",
    "#0b8467",
    "#a1458c",
    "#8a6b00",
    "#5b5f97",
    "#7a4a2b",
    "#4d7a1e",
    "#1c8798",
    "#9b5468",
)
GREY, INK, GRID = "#8b94a3", "#1c2430", "#e6e4df"
RAMP = ("#8c2d04", "#d9772b", "#9a9a52", "#4a9a8f", "#0b5fa5")
DASHES = {"": "-", "dash": "--", "dot": ":"}
DPI = 144
NUM_TICKS = 7


def write_pngs(plots: list[Plot], folder: Path) -> list[Path]:
    """One file per plot, named after its key.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError('no matplotlib: pip install "baton-serve[plots]"') from error
    written = []
    for plot in plots:
        lanes = len(plot.y.names) if isinstance(plot.y, Lanes) else 0
        figure = Figure(figsize=(8.0, max(4.2, 1.6 + 0.19 * lanes)), layout="constrained")
        FigureCanvasAgg(figure)  # no window system is asked for
        axes = figure.add_subplot()
        _draw(plot, axes)
        if plot.ramp:
            for color, share in ((RAMP[0], "0 %"), (RAMP[-1], "100 %")):
                axes.scatter([], [], s=14, color=color, label=f"{plot.ramp}: {share}")
        if plot.ramp or len(legend(plot.layers)) > 1:
            figure.legend(loc="outside lower left", fontsize=8, frameon=False, ncols=3)
        path = folder / f"{plot.key}.png"
        figure.savefig(path, dpi=DPI)
        written.append(path)
    return written


def _draw(plot: Plot, axes: "Axes") -> None:
    has_upright = any(isinstance(layer, Rule) and layer.vertical for layer in plot.layers)
    title = axes.set_title(plain(plot.title), loc="left", pad=20 if has_upright else 8)
    title.set(fontsize=11, fontweight="bold", color=INK)
    axes.grid(visible=True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    for layer in plot.layers:
        _layer(axes, layer)
    _axis(axes, "x", plot.x, x_values(plot.layers))
    if isinstance(plot.y, Lanes):
        names = [plain(name) for name in plot.y.names]
        axes.set_yticks(range(len(names)), names, fontsize=8 if len(names) > 20 else 10)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
    else:
        _axis(axes, "y", plot.y, y_values(plot.layers))


def plain(text: str) -> str:
    """Without the dollars that would make it a formula."""
    return text.replace("$", r"\$")


def color_of(index: int) -> str:
    return GREY if index == NEUTRAL else COLORS[index % len(COLORS)]


def _layer(axes: "Axes", layer: Layer) -> None:
    match layer:
        case Band():
            x = [point[0] for point in layer.points]
            low, high = ([point[i] for point in layer.points] for i in (1, 2))
            axes.fill_between(x, low, high, color=color_of(layer.color), alpha=0.16, linewidth=0)
        case Line():
            axes.plot(
                [x for x, _ in layer.points],
                [y for _, y in layer.points],
                DASHES[layer.dashes],
                color=color_of(layer.color),
                drawstyle="steps-post" if layer.steps else "default",
                marker="o" if layer.dots else "",
                markersize=4,
                linewidth=1.7,
                label=plain(layer.name) or "_",
            )
        case Dots():
            _dots(axes, layer)
        case Spans():
            axes.barh(
                [span.lane for span in layer.spans],
                [span.end - span.start for span in layer.spans],
                left=[span.start for span in layer.spans],
                height=0.62,
                color=color_of(layer.color),
                label=plain(layer.name) or "_",
            )
        case Whiskers():
            for lane, start, end in layer.points:
                axes.plot([start, end], [lane, lane], color=INK, linewidth=1.3, marker="|")
        case LaneText():
            for lane, at, text in layer.texts:
                axes.annotate(
                    plain(text), (at, lane), (5, 0), textcoords="offset points", va="center"
                )
        case Rule():
            _rule(axes, layer)


def _dots(axes: "Axes", dots: Dots) -> None:
    colors = [
        color_of(dots.color) if dot.shade is None else RAMP[min(4, int(dot.shade * 5))]
        for dot in dots.dots
    ]
    faces = ["none" if dot.hollow else color for dot, color in zip(dots.dots, colors, strict=True)]
    axes.scatter(
        [max(dot.x, LOG_FLOOR) for dot in dots.dots],
        [max(dot.y, LOG_FLOOR) for dot in dots.dots],
        s=14,
        facecolors=faces,
        edgecolors=colors,
        label=plain(dots.name) or "_",
        zorder=3,
    )


def _rule(axes: "Axes", rule: Rule) -> None:
    line = axes.axvline if rule.vertical else axes.axhline
    line(rule.at, color=INK, linewidth=1.0, linestyle=(0, (2, 3)))
    at = (rule.at, 1.0) if rule.vertical else (1.0, rule.at)
    axes.annotate(
        plain(rule.label),
        at,
        (0, 3) if rule.vertical else (3, 0),
        xycoords=axes.get_xaxis_transform() if rule.vertical else axes.get_yaxis_transform(),
        textcoords="offset points",
        ha="center" if rule.vertical else "left",
        va="bottom" if rule.vertical else "center",
    )


def _axis(axes: "Axes", which: str, axis: Axis, values: list[float]) -> None:
    """The page's limits and words."""
    limits = scale(axis, values, 0.0, 1.0)
    if which == "x":
        axes.set_xscale("log" if axis.log else "linear")
        axes.set_xlim(limits.low, limits.high)
        axes.set_xlabel(plain(axis.label))
    else:
        axes.set_yscale("log" if axis.log else "linear")
        axes.set_ylim(limits.low, limits.high)
        axes.set_ylabel(plain(axis.label))
    own = axes.xaxis if which == "x" else axes.yaxis
    marks = ticks(limits, NUM_TICKS)
    own.set_ticks(marks, [tick_text(mark, axis.unit, marks) for mark in marks])
    own.set_ticks([], minor=True)
