"""The evaluation of the embedded model counts and reports what it should."""

from random import Random

from bench.retrieval import KINDS, NUM_DEPTHS, Result, depth_of, questions, report
from modeling.embedded.grammar import write_document


def test_questions_cover_every_depth_and_kind() -> None:
    document = write_document(Random(0), 6000, lambda text: len(text) // 4)
    drawn = questions(Random(1), document, 60)
    assert [kind for kind, _, _ in drawn[:3]] == list(KINDS)
    assert all((fact.value is None) is (depth is None) for _, fact, depth in drawn)
    tenths = {int(depth * NUM_DEPTHS) for _, _, depth in drawn if depth is not None}
    assert tenths == set(range(NUM_DEPTHS))


def result(depth: float | None, answer: str) -> Result:
    return Result(1024, "stated" if depth is not None else "absent", depth, "?", "a", answer, 0.1)


def test_a_wrong_answer_is_counted_where_it_belongs_and_shown() -> None:
    results = [result(0.05, "a"), result(0.05, "b"), result(1.0, "a"), result(None, "a")]
    assert [depth_of(one) for one in results] == [0, 0, NUM_DEPTHS - 1, None]
    text = report(results)
    assert "| 1024 | 3/4 = 75.0%" in text
    assert "| 1024 | 1/2 | - |" in text
    assert "wrong: '?' -> 'b', not 'a'" in text
