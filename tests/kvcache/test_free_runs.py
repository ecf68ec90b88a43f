"""Free runs against a plain set."""

import hypothesis.strategies as st
from hypothesis import given

from kvcache.free_runs import FreeRuns


@given(st.integers(0, 40), st.lists(st.tuples(st.booleans(), st.integers(0, 60)), max_size=60))
def test_behaves_as_a_set_of_maximal_runs(size: int, steps: list[tuple[bool, int]]) -> None:
    runs, free = FreeRuns(size), set(range(size))
    for is_take, number in steps:
        if is_take:
            count = min(number, len(free))
            taken = runs.take(count, after=number)
            assert len(set(taken)) == count
            assert set(taken) <= free
            if number not in free and number + 1 in free and count:
                assert taken[0] == number + 1
            free -= set(taken)
        elif number < size and number not in free:
            runs.add(number)
            free.add(number)
        assert len(runs) == len(free)
        listed = runs.runs()
        assert [i for start, n in listed for i in range(start, start + n)] == sorted(free)
        ends = [start + n for start, n in listed]
        assert all(end < start for end, (start, _) in zip(ends, listed[1:], strict=False))


def test_one_run_is_taken_when_one_suffices() -> None:
    runs = FreeRuns(10)
    runs.take(10)
    for block_id in (0, 1, 4, 5, 6, 9):
        runs.add(block_id)
    assert runs.take(3) == [4, 5, 6]
    assert sorted(runs.take(3)) == [0, 1, 9]
