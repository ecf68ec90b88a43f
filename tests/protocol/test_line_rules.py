"""The limit of log lines by kind, and the splitting of a stream into lines: properties."""

from hypothesis import given
from hypothesis import strategies as st

from protocol.process.line_rules import LineSplitter, RateLimit

asked = st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0, 5)), max_size=120)


@given(asked, st.integers(1, 5), st.floats(0.1, 3))
def test_no_kind_has_more_than_its_burst_and_rate(
    lines: list[tuple[str, float]], burst: int, per_s: float
) -> None:
    limit, now = RateLimit(burst, per_s), 0.0
    written: dict[str, list[float]] = {}
    num_told = 0
    for kind, wait_s in lines:
        now += wait_s
        told = limit.admit(kind, now)
        if told is not None:
            num_told += told
            written.setdefault(kind, []).append(now)
    for times in written.values():
        for first in range(len(times)):
            for last in range(first, len(times)):
                allowed = burst + per_s * (times[last] - times[first])
                assert last - first + 1 <= allowed + 1e-6
    assert sum(map(len, written.values())) + limit.num_dropped == len(lines)
    later = now + burst / per_s + 1
    assert num_told + sum(count for _, count in limit.settle(later)) == limit.num_dropped


@given(asked, st.integers(1, 3))
def test_kinds_are_bounded_and_nothing_is_lost_uncounted(
    lines: list[tuple[str, float]], max_kinds: int
) -> None:
    limit, now, num_written, num_told = RateLimit(1, 0.5, max_kinds), 0.0, 0, 0
    for kind, wait_s in lines:
        now += wait_s
        told = limit.admit(kind, now)
        num_written += told is not None
        num_told += (told or 0) + sum(count for _, count in limit.settle(now))
    assert num_written + limit.num_dropped == len(lines)
    quiet = limit.settle(now + 10)
    assert len(quiet) <= max_kinds + 1
    assert num_told + sum(count for _, count in quiet) == limit.num_dropped


def test_a_busy_kind_takes_nothing_from_another() -> None:
    limit = RateLimit(2, 1.0)
    assert [limit.admit("noise", 0.0) for _ in range(4)] == [0, 0, None, None]
    assert limit.admit("signal", 0.0) == 0
    assert limit.settle(0.5) == []
    assert limit.admit("noise", 1.0) == 2
    assert limit.settle(9.0) == []


@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(1, 16))
def test_lines_are_those_of_the_whole_however_it_is_cut(pieces: list[bytes], limit: int) -> None:
    splitter = LineSplitter(limit)
    lines = [line for piece in pieces for line in splitter.feed(piece)] + splitter.end()
    expected = b"".join(pieces).split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert len(lines) == len(expected)
    for line, whole in zip(lines, expected, strict=True):
        if len(whole) <= limit:
            assert line == whole
        else:
            assert line == whole[:limit] + b" ... and %d bytes more" % (len(whole) - limit)
