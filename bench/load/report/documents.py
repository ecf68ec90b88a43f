"""Documents that are read once and asked often: what the first question costs, and the next."""

from collections.abc import Sequence

from bench.load.metrics import ttft_of
from bench.load.record import RequestRecord
from bench.load.report.plot import Axis, Dot, Dots, Layer, Plot
from bench.load.report.runs import Side
from bench.load.report.scale import LOG_FLOOR, seconds

DOCUMENT, QUESTION = "document", "question"


def documents(sides: Sequence[Side]) -> Plot | None:
    """TTFT of documents and of the questions about them against length; None without any."""
    layers: list[Layer] = []
    rows: list[tuple[str, ...]] = [
        ("target", "documents", "median cold TTFT", "prompt tokens/s", "questions", "median TTFT")
    ]
    for side in sides:
        own = {kind: _kind(side, kind) for kind in (DOCUMENT, QUESTION)}
        if not own[DOCUMENT] or not own[QUESTION]:
            continue
        for kind, records in own.items():
            dots = tuple(_dot(record, hollow=kind == QUESTION) for record in records)
            layers.append(Dots(f"{side.name}, {kind}s", side.color, dots))
        rows.append(_row(side, own[DOCUMENT], own[QUESTION]))
    if not layers:
        return None
    return Plot(
        "documents",
        "Documents, and questions about them",
        Axis("prompt tokens", "tokens", log=True),
        Axis("time to first token", "s", log=True),
        tuple(layers),
        "Full dots: a document's first request. Hollow dots: later questions in its session. Where "
        "the prompt is still cached, these do not grow with its length.",
        table=tuple(rows),
    )


def _kind(side: Side, kind: str) -> list[RequestRecord]:
    return [
        record
        for record in side.answered
        if record.kind == kind and ttft_of(record) is not None and record.num_prompt_tokens > 0
    ]


def _dot(record: RequestRecord, *, hollow: bool) -> Dot:
    at = max(ttft_of(record) or 0.0, LOG_FLOOR)
    tip = f"{record.session}, {record.kind}: {record.num_prompt_tokens:,} tokens, {seconds(at)}"
    return Dot(record.num_prompt_tokens, at, tip, hollow=hollow)


def _row(
    side: Side, cold: Sequence[RequestRecord], warm: Sequence[RequestRecord]
) -> tuple[str, ...]:
    took = sum(ttft_of(record) or 0.0 for record in cold)
    rate = sum(record.num_prompt_tokens for record in cold) / took if took else 0.0
    return (
        side.name,
        str(len(cold)),
        seconds(_median(cold)),
        f"{rate:,.0f}",
        str(len(warm)),
        seconds(_median(warm)),
    )


def _median(records: Sequence[RequestRecord]) -> float:
    values = sorted(ttft_of(record) or 0.0 for record in records)
    return values[len(values) // 2]
