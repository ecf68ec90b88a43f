"""Routing: nothing to choose, no effect; a prefix to hit, and policies differ as they should."""

from bench.simulate.estimates import pick
from bench.simulate.report import Scale
from bench.simulate.routing import (
    CASES,
    EQUAL,
    POLICIES,
    PRODUCTION,
    compare,
    null_cases,
    setting_of,
)
from bench.simulate.step_time import ROOFLINE


def test_one_worker_or_equal_workers_leave_nothing_to_choose() -> None:
    for null in null_cases(Scale(2, 0.2)):
        assert null.holds, null


def test_who_looks_at_prefixes_hits_them() -> None:
    rows = list(compare(setting_of(ROOFLINE, EQUAL), CASES[0], Scale(1, 0.5)))
    hits = {name: min(pick(rows, "hit_rate", policy=name)) for name in POLICIES}
    for blind in ("random", "round robin"):
        for seeing in (PRODUCTION, "prefix only", "prefix + tokens"):
            assert hits[seeing] > hits[blind] + 0.02
    skews = {name: max(pick(rows, "imbalance", policy=name)) for name in POLICIES}
    assert skews["least tokens"] < skews["prefix only"]
