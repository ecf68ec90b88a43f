"""Whether a report says that its runs may be believed."""

from pathlib import Path
from typing import Any

import msgspec

from bench.load.analysis.validity import STOPPED
from bench.load.sweep import SweepRecord
from bench.report.runs import Run
from bench.report.verdict import judge
from tests.bench.example import sample_run


def _run(name: str = "run", sweep: SweepRecord | None = None, **changes: Any) -> Run:
    manifest, records = sample_run(0, 4.0, 4.0)
    changes = {"valid": True, "invalid_reasons": [], **changes}
    return Run(Path(name), msgspec.structs.replace(manifest, **changes), records, None, sweep)


def test_a_valid_run() -> None:
    verdict = judge([_run()])
    assert (verdict.word, verdict.reasons) == ("VALID", ())


def test_reasons_are_told_with_their_run() -> None:
    verdict = judge([_run("a"), _run("b", valid=False, invalid_reasons=["late", "lost"])])
    assert verdict.word == "INVALID"
    assert verdict.reasons == ("b: late", "b: lost")


def test_what_all_runs_share_is_told_once() -> None:
    runs = [_run(name, valid=False, invalid_reasons=["late"]) for name in "abc"]
    assert judge(runs).reasons == ("all runs: late",)


def test_invalid_without_a_reason_is_invalid() -> None:
    assert not judge([_run(valid=False)]).is_valid


def test_no_records_are_no_run() -> None:
    run = _run()
    assert not judge([Run(run.folder, run.manifest, [])]).is_valid


def test_metrics_of_two_versions_cannot_be_compared() -> None:
    verdict = judge([_run("a", metrics_version="1.0"), _run("b", metrics_version="2.0")])
    assert verdict.reasons == ("metrics of versions 1.0, 2.0 cannot be compared",)


def test_a_closed_loop_is_called_one() -> None:
    verdict = judge([_run(driver={"loop": "closed"})])
    assert verdict.is_valid
    assert verdict.notes[0].startswith("Closed loop")


def test_an_import_is_neither() -> None:
    reasons = ["imported from elsewhere"]
    run = _run(valid=False, invalid_reasons=reasons, driver={"imported_from": "elsewhere"})
    verdict = judge([run])
    assert verdict.word == "UNAUDITED"
    assert not verdict.is_valid
    assert verdict.notes == tuple(reasons)


def test_a_sweep_may_end_a_lost_round() -> None:
    sweep = SweepRecord("", "t", 1, ())
    lost = _run(sweep=sweep, valid=False, invalid_reasons=[STOPPED])
    assert judge([lost]).is_valid
    late = _run(sweep=sweep, valid=False, invalid_reasons=[STOPPED, "late"])
    assert judge([late]).reasons == ("late",)
    alone = _run(valid=False, invalid_reasons=[STOPPED])
    assert judge([alone]).word == "INVALID"
