"""Documents in a report: known times, known break-even."""

from pathlib import Path

import msgspec
import pytest

from bench.load.record import RequestRecord
from bench.report.drawing.plot import Dots, LaneText, Line, Plot, Spans
from bench.report.figures.documents import documents
from bench.report.runs import Run, Side, sides_of
from tests.bench.example import sample_run
from tests.bench.records import record


def _asked(session: int, turn: int, ttft_s: float, num_tokens: int) -> RequestRecord:
    return record(
        10 * session + turn,
        ttft_s,
        at_s=10.0 * session + turn,
        session=f"s{session}",
        turn=turn,
        kind="question" if turn else "document",
        num_prompt_tokens=num_tokens,
    )


def _side(*records: RequestRecord) -> Side:
    manifest = msgspec.structs.replace(sample_run(0, 1.0, 1.0)[0], targets=[{"name": "t"}])
    (side,) = sides_of([Run(Path("run"), manifest, records)])
    return side


def _session(number: int, cold_s: float, first_s: float, later_s: float) -> list[RequestRecord]:
    took = (cold_s, first_s, later_s, later_s)
    return [_asked(number, turn, at, 1000 * (number + 1)) for turn, at in enumerate(took)]


def _plots(*records: RequestRecord) -> dict[str, Plot]:
    return {plot.key: plot for plot in documents([_side(*records)])}


def test_all_figures_of_documents_by_hand() -> None:
    """Documents of 1000, 2000 and 3000 tokens in 1, 2 and 3 s; questions in 0.5, then 0.2 s."""
    records = [r for number in range(3) for r in _session(number, number + 1.0, 0.5, 0.2)]
    plots = _plots(*records)
    head, row = plots["documents"].table
    assert dict(zip(head, row, strict=True)) == {
        "target": "t",
        "documents": "3",
        "ingest tokens/s": "1,000",
        "time to ready (cold TTFT)": "2.00 s",
        "first question after": "500 ms of 3",
        "later questions": "200 ms of 6",
        "questions to break even": "2",
    }
    bars = [
        span for x in plots["documents-ready"].layers if isinstance(x, Spans) for span in x.spans
    ]
    assert [bar.end for bar in bars] == pytest.approx([2.0, 0.5, 0.2])
    (texts,) = [x.texts for x in plots["documents-ready"].layers if isinstance(x, LaneText)]
    assert texts[0][2] == "2.00 s, 1,000 tokens/s"
    even = plots["documents-break-even"]
    lines = {x.name: dict(x.points) for x in even.layers if isinstance(x, Line)}
    assert lines["t, read once"][0.0] == 2.0
    assert lines["t, read once"][5.0] == pytest.approx(2.0 + 5 * 0.2)
    assert lines["t, read with each"][5.0] == pytest.approx(10.0)
    (dot,) = [dot for x in even.layers if isinstance(x, Dots) for dot in x.dots]
    assert (dot.x, dot.y) == pytest.approx((2.0 / 1.8, 2.0 * 2.0 / 1.8))
    assert "t: from 2 questions on" in even.note


def test_questions_that_are_hardly_faster_take_many() -> None:
    even = _plots(*_session(0, 1.0, 0.9, 0.9))["documents-break-even"]
    assert "from 10 questions on" in even.note
    assert even.x.high == 20.0


def test_a_cache_that_is_lost_never_pays() -> None:
    plots = _plots(*_session(0, 1.0, 1.0, 1.2))
    assert "t: never" in plots["documents-break-even"].note
    assert plots["documents"].table[1][-1] == "never"


def test_sessions_that_lost_their_document_do_not_count() -> None:
    whole, torn = _session(0, 1.0, 0.5, 0.2), _session(1, 9.0, 9.0, 9.0)
    torn[0] = msgspec.structs.replace(torn[0], outcome="timeout")
    assert _plots(*whole, *torn)["documents"].table == _plots(*whole)["documents"].table
    assert documents([_side(*torn)]) == []
    assert documents([_side(whole[0])]) == []
