"""When the coordinator collects its garbage."""

import gc

from coordinator.loop.garbage import MIDDLE, YOUNG, has_grown


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
