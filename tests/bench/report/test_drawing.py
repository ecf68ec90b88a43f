"""Scales, ticks and labels of the drawings."""

import math
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.report.drawing.layout import clip_text, spread, text_width, thin_labels
from bench.report.drawing.plot import Axis, Lanes, Line, Plot, Rule, Span, Spans
from bench.report.drawing.scale import Scale, between, number, scale, seconds, tick_text, ticks
from bench.report.drawing.svg import NARROW, WIDE, draw

values = st.floats(1e-6, 1e6, allow_nan=False)


@given(st.lists(values, min_size=1, max_size=20), st.booleans())
def test_a_scale_holds_its_values_in_order(found: list[float], log: bool) -> None:
    to_pixel = scale(Axis("", log=log), found, 10.0, 210.0)
    pixels = [to_pixel(value) for value in sorted(found)]
    assert pixels == sorted(pixels)
    assert all(10.0 - 1e-6 <= pixel <= 210.0 + 1e-6 for pixel in pixels)
    assert to_pixel.low <= min(found) * (1 + 1e-9)
    assert to_pixel.high >= max(found) * (1 - 1e-9)


@given(st.lists(values, min_size=1, max_size=20), st.booleans(), st.integers(3, 12))
def test_ticks_are_inside_and_few(found: list[float], log: bool, num: int) -> None:
    own = scale(Axis("", log=log), found, 0.0, 1.0)
    marks = ticks(own, num)
    assert 1 <= len(marks) <= num + 2
    slack = 1e-9 * (own.high - own.low)
    assert all(own.low - slack <= mark <= own.high * (1 + 1e-9) + slack for mark in marks)
    assert marks == sorted(set(marks))


def test_values_outside_are_put_on_the_border() -> None:
    own = Scale(0.0, 1.0, 0.0, 100.0)
    assert [own(value) for value in (-1.0, 0.5, 7.0)] == [0.0, 50.0, 100.0]


def test_ticks_of_seconds_share_a_unit() -> None:
    marks = [0.0, 0.1, 0.2, 0.3]
    assert [tick_text(mark, "s", marks) for mark in marks] == ["0", "100 ms", "200 ms", "300 ms"]
    marks = [1e-3, 1e-2, 0.1, 1.0, 10.0]
    assert [tick_text(mark, "s", marks) for mark in marks] == [
        *("1 ms", "10 ms", "100 ms", "1 s", "10 s")
    ]
    assert tick_text(0.999, "share", [0.999, 1.0]) == "99.9 %"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 ms"),
        (2.5e-5, "25 µs"),
        (0.00123, "1.23 ms"),
        (0.0456, "45.6 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.00 s"),
        (12.345, "12.3 s"),
        (4321.0, "4,321 s"),
        (None, "\u2013"),
        (math.inf, "\u2013"),
    ],
)
def test_durations_are_written_for_people(value: float | None, text: str) -> None:
    assert seconds(value) == text


def test_intervals_name_their_unit_once() -> None:
    assert between(0.0161, 0.0172, "s").replace("\u00a0", " ") == "16.1 to 17.2 ms"
    assert between(0.5, 1.5, "s").replace("\u00a0", " ") == "500 ms to 1.50 s"
    assert between(0.9, 0.95, "share") == "90.0 to 95.0%"
    assert between(-math.inf, 0.5, "share") == "? to 50.0%"
    assert number(12345.0, "tokens") == "12,345"


@given(st.lists(st.floats(0, 300), max_size=12))
def test_labels_keep_apart(wanted: list[float]) -> None:
    placed = spread(wanted, 17.0, 0.0)
    assert all(low + 17.0 <= high + 1e-6 for low, high in pairwise(sorted(placed)))
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    assert [placed[index] for index in order] == sorted(placed)


def test_tick_labels_never_touch() -> None:
    labels = [(10.0 * index, f"{index * 1000} s") for index in range(30)]
    kept = thin_labels(labels, 300.0)
    ends = [(at - text_width(text) / 2, at + text_width(text) / 2) for at, text in kept]
    assert all(before[1] < after[0] for before, after in pairwise(ends))
    assert ends[0][0] >= 0.0
    assert ends[-1][1] <= 300.0


def test_long_names_are_cut_with_an_ellipsis() -> None:
    assert clip_text("short", 100.0) == "short"
    cut = clip_text("a very long name of a target", 80.0)
    assert cut.endswith("…")
    assert text_width(cut) <= 80.0


def _plot(**changes: object) -> Plot:
    line = Line("a", 0, ((0.0, 1.0), (1.0, 2.0)))
    base = {"key": "k", "title": "t", "x": Axis("x"), "y": Axis("y"), "layers": (line,)}
    return Plot(**{**base, **changes})  # type: ignore[arg-type]  # the fields of Plot


def test_one_thing_needs_no_legend() -> None:
    texts = [element.text for element in draw(_plot()).iter("text")]
    assert "a" not in texts
    both = (Line("a", 0, ((0.0, 1.0),)), Line("b", 1, ((1.0, 2.0),)))
    texts = [element.text for element in draw(_plot(layers=both)).iter("text")]
    assert {"a", "b"} <= set(texts)


def test_labels_of_rules_do_not_overlap() -> None:
    rules = tuple(Rule(0.99 + 0.001 * index, f"rule {index}") for index in range(4))
    root = draw(_plot(layers=(Line("a", 0, ((0.0, 0.0), (1.0, 1.0))), *rules)))
    at = sorted(
        float(e.get("y", 0)) for e in root.iter("text") if (e.text or "").startswith("rule")
    )
    assert len(at) == 4
    assert all(high - low >= 15.0 for low, high in pairwise(at))


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_names_that_are_too_wide_stand_over_their_bars(width: int) -> None:
    names = ("a target with quite a long name, mean of 1000", "b")
    spans = Spans("", 0, (Span(0, 0.0, 1.0), Span(1, 0.0, 2.0)))
    root = draw(_plot(y=Lanes(names), layers=(spans,)), width)
    texts = {element.text: element for element in root.iter("text")}
    assert names[0] in texts
    bars = [element for element in root.iter("rect") if element.get("class") == "bar c0"]
    assert all(float(bar.get("x", 0)) + float(bar.get("width", 0)) <= width for bar in bars)


def test_thousands_of_points_do_not_make_a_mark_each() -> None:
    random = Random(0)
    points = tuple((float(index), random.random()) for index in range(5000))
    root = draw(_plot(layers=(Line("a", 0, points),)))
    assert len(list(root.iter("circle"))) == 0
