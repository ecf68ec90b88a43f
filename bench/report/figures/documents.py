"""Documents that are read once and asked often: what reading one costs, and when that has paid.

A document's first request brings the whole text and a question: its TTFT is what the text costs
cold, and the time until the document is ready, since from then on every question finds it. The
first question after that, and the later ones, are those of kind ``question`` in its session.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.load.analysis.intervals import percentile, percentile_interval
from bench.load.analysis.metrics import ttft_of
from bench.load.record import RequestRecord
from bench.report.drawing.plot import (
    Axis,
    Dot,
    Dots,
    Lanes,
    LaneText,
    Layer,
    Line,
    Plot,
    Span,
    Spans,
    Whiskers,
)
from bench.report.drawing.scale import LOG_FLOOR, seconds
from bench.report.runs import Side

DOCUMENT, QUESTION = "document", "question"
MIN_QUESTIONS, MAX_QUESTIONS = 6, 40  # that the axis of the break-even goes to


@dataclass(frozen=True, slots=True)
class Figures:
    """What one target did with documents; each list in order of the intended times."""

    side: Side
    cold: list[RequestRecord]
    first: list[RequestRecord]
    """Of each session, the first question after its document was ready."""
    later: list[RequestRecord]

    @property
    def tokens_per_s(self) -> float:
        """Prompt tokens of all documents over the sum of their times to ready."""
        took_s = sum(ttft_of(record) or 0.0 for record in self.cold)
        return sum(record.num_prompt_tokens for record in self.cold) / took_s if took_s else 0.0

    @property
    def ready_s(self) -> float:
        return _median(self.cold)

    @property
    def warm_s(self) -> float:
        return _median([*self.first, *self.later])

    @property
    def break_even(self) -> float | None:
        """From how many questions on it costs less to have read the document before them than to
        read it with each: ``ready + n * warm <= n * cold``. None where warm is no faster."""
        saved_s = self.ready_s - self.warm_s
        return self.ready_s / saved_s if saved_s > 0.0 else None


def documents(sides: Sequence[Side]) -> list[Plot]:
    """All plots of documents; none where no target had a document and a question about it."""
    found = [figures for side in sides if (figures := _figures(side)) is not None]
    return [_by_length(found), _waits(found), _break_even(found)] if found else []


def _figures(side: Side) -> Figures | None:
    ordered = sorted(side.answered, key=lambda record: (record.intended_s, record.index))
    told = [r for r in ordered if ttft_of(r) is not None and r.num_prompt_tokens > 0]
    cold = [record for record in told if record.kind == DOCUMENT]
    sessions = {record.session for record in cold}
    first: list[RequestRecord] = []
    later: list[RequestRecord] = []
    for record in told:
        if record.kind == QUESTION and record.session in sessions:
            (first if record.turn == 1 else later).append(record)
    return Figures(side, cold, first, later) if cold and (first or later) else None


def _by_length(found: Sequence[Figures]) -> Plot:
    layers: list[Layer] = []
    for figures in found:
        name, color = figures.side.name, figures.side.color
        warm = [*figures.first, *figures.later]
        for kind, records, hollow in ((DOCUMENT, figures.cold, False), (QUESTION, warm, True)):
            dots = tuple(_dot(record, hollow=hollow) for record in records)
            layers.append(Dots(f"{name}, {kind}s", color, dots))
    return Plot(
        "documents",
        "Documents, and questions about them",
        Axis("prompt tokens", "tokens", log=True),
        Axis("time to first token", "s", log=True),
        tuple(layers),
        "Full dots: a document's first request. Hollow dots: later questions in its session. Where "
        "the prompt is still cached, these do not grow with its length.",
        tab="by length",
        table=_table(found),
    )


def _dot(record: RequestRecord, *, hollow: bool) -> Dot:
    at = max(ttft_of(record) or 0.0, LOG_FLOOR)
    tip = f"{record.session}, {record.kind}: {record.num_prompt_tokens:,} tokens, {seconds(at)}"
    return Dot(record.num_prompt_tokens, at, tip, hollow=hollow)


def _table(found: Sequence[Figures]) -> tuple[tuple[str, ...], ...]:
    rows: list[tuple[str, ...]] = [
        (
            "target",
            "documents",
            "ingest tokens/s",
            "time to ready (cold TTFT)",
            "first question after",
            "later questions",
            "questions to break even",
        )
    ]
    for figures in found:
        even = figures.break_even
        rows.append(
            (
                figures.side.name,
                str(len(figures.cold)),
                f"{figures.tokens_per_s:,.0f}",
                seconds(figures.ready_s),
                f"{seconds(_median(figures.first))} of {len(figures.first)}",
                f"{seconds(_median(figures.later))} of {len(figures.later)}",
                "never" if even is None else str(math.ceil(even)),
            )
        )
    return tuple(rows)


def _waits(found: Sequence[Figures]) -> Plot:
    """Medians: until ready, of the first question after it, and of the others."""
    names: list[str] = []
    bars: list[Spans] = []
    whiskers: list[tuple[int, float, float]] = []
    texts: list[tuple[int, float, str]] = []
    for figures in found:
        spans: list[Span] = []
        for words, records in (
            ("ready, or cold", figures.cold),
            ("first question after ready", figures.first),
            ("later questions", figures.later),
        ):
            if not records:
                continue
            lane, middle = len(names), _median(records)
            names.append(f"{figures.side.name}, {words}")
            spans.append(Span(lane, 0.0, middle, f"{names[-1]}: {seconds(middle)}"))
            low, high = percentile_interval([ttft_of(r) or 0.0 for r in records], 0.5)
            if math.isfinite(low) and math.isfinite(high):
                whiskers.append((lane, low, high))
            else:
                high = middle
            rate = f", {figures.tokens_per_s:,.0f} tokens/s" if records is figures.cold else ""
            texts.append((lane, max(middle, high), f"{seconds(middle)}{rate}"))
        bars.append(Spans("", figures.side.color, tuple(spans)))
    return Plot(
        "documents-ready",
        "Time until a document is ready, and the first questions after",
        Axis("median time to first token", "s", low=0.0),
        Lanes(tuple(names)),
        (*bars, Whiskers(tuple(whiskers)), LaneText(tuple(texts))),
        "A document is ready when its first request has its first token: that is also what a "
        "question costs cold. Tokens/s are those of all documents over the sum of these times. "
        "Whiskers are 95 % intervals of the medians, where there are enough values for one.",
        tab="ready and after",
    )


def _break_even(found: Sequence[Figures]) -> Plot:
    """Seconds waited in all, against the number of questions, both ways."""
    wanted = [2.0 * (figures.break_even or 0.0) for figures in found]
    most = min(MAX_QUESTIONS, max(MIN_QUESTIONS, math.ceil(max(wanted, default=0.0))))
    layers: list[Layer] = []
    told: list[str] = []
    for figures in found:
        name, color, even = figures.side.name, figures.side.color, figures.break_even
        ready, warm = figures.ready_s, figures.warm_s
        once = tuple((float(n), ready + n * warm) for n in range(most + 1))
        each = tuple((float(n), n * ready) for n in range(most + 1))
        layers.append(Line(f"{name}, read once", color, once))
        layers.append(Line(f"{name}, read with each", color, each, "dash"))
        if even is None:
            told.append(f"{name}: never, since a question about a ready document is no faster")
            continue
        told.append(f"{name}: from {math.ceil(even)} questions on")
        if even <= most:
            tip = f"{name}: both ways cost the same at {even:.2f} questions"
            layers.append(Dots("", color, (Dot(even, even * ready, tip),)))
    return Plot(
        "documents-break-even",
        "From how many questions on reading a document once has paid",
        Axis("questions about one document", low=0.0, high=float(most)),
        Axis("seconds waited in all", "s", low=0.0),
        tuple(layers),
        "By medians, the dot where both cost the same. Read once: the time to ready, then a "
        "question each time. Read with each: the cold time for every question. "
        f"{'; '.join(told)}.",
        tab="break-even",
    )


def _median(records: Sequence[RequestRecord]) -> float:
    values = sorted(ttft_of(record) or 0.0 for record in records)
    return percentile(values, 0.5) if values else math.nan
