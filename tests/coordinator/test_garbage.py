"""When the coordinator collects its garbage."""

import gc
import sys
import threading
import time
from collections.abc import Iterator

from coordinator.loop.garbage import MIDDLE, YOUNG, has_grown, num_old


def test_there_is_something_to_collect_only_after_objects_have_grown_old() -> None:
    before, was_on = gc.get_threshold(), gc.isenabled()
    gc.disable()
    try:
        gc.set_threshold(YOUNG, MIDDLE, before[2])
        gc.collect()
        assert not has_grown()
        gc.collect(0)
        assert has_grown()
        gc.collect(1)
        assert has_grown()
        gc.collect()
        assert not has_grown()
    finally:
        gc.set_threshold(*before)
        if was_on:
            gc.enable()


def test_counting_old_objects_disturbs_no_thread() -> None:
    """A tuple that is being built while somebody holds a reference to it is a SystemError."""
    problems: list[SystemError] = []
    end = time.monotonic() + 0.5

    def slowly() -> Iterator[list[int]]:
        for number in range(60):  # more than a generator's first guess: the tuple grows
            if number == 5:
                gc.collect(1)  # so that it is old
            yield [number]

    def build() -> None:
        while time.monotonic() < end:
            try:
                tuple(slowly())
            except SystemError as error:
                problems.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(target=build)
        thread.start()
        while time.monotonic() < end:
            num_old()
        thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not problems
