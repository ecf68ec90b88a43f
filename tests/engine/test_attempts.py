"""Attempts: late and repeated ones never begin, and a new one names those before it."""

from engine.attempts import Attempts


def test_a_new_attempt_supersedes_the_earlier_ones_of_its_request() -> None:
    attempts: Attempts[str] = Attempts()
    attempts.begin(("a", 1), "a1")
    attempts.begin(("b", 1), "b1")
    attempts.begin(("a", 2), "a2")
    assert attempts.superseded_by(("a", 4)) == ["a1", "a2"]
    assert attempts.superseded_by(("c", 1)) == []
    assert list(attempts) == [("a", 1), ("b", 1), ("a", 2)]


def test_what_is_here_or_over_does_not_begin_again() -> None:
    attempts: Attempts[str] = Attempts()
    attempts.begin(("a", 2), "a2")
    assert attempts.superseded_by(("a", 2)) is None, "it is here"
    assert attempts.superseded_by(("a", 1)) is None, "a later one is here"
    attempts.end(("a", 2))
    assert not attempts
    assert attempts.superseded_by(("a", 2)) is None, "it is over"
    assert attempts.superseded_by(("a", 3)) == []


def test_an_abort_may_come_before_its_attempt() -> None:
    attempts: Attempts[str] = Attempts()
    attempts.end(("a", 3))
    attempts.end(("a", 1))
    assert attempts.superseded_by(("a", 3)) is None
    assert attempts.superseded_by(("a", 4)) == []


def test_it_remembers_the_latest_ended_attempts_of_some_requests() -> None:
    attempts: Attempts[str] = Attempts(max_ended=2)
    for name in ("a", "b", "a", "c"):
        attempts.end((name, 1))
    assert attempts.superseded_by(("a", 1)) is None
    assert attempts.superseded_by(("b", 1)) == [], "forgotten: the others were newer"
