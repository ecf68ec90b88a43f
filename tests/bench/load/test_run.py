"""Whole runs: processes, target discovery, time lines, the command line, a sweep."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import trustme
from msgspec.structs import replace

from bench.load.analysis.metrics import METRICS_VERSION, summarise
from bench.load.analysis.slo import Deadline, Objective, Slo
from bench.load.analysis.validity import (
    Audit,
    invalid_reasons,
    lag_limit_s,
    largest_share,
    send_lag,
)
from bench.load.driving.driver import Progress
from bench.load.driving.process import num_processes_for, total
from bench.load.driving.target import api_of, discover, num_accelerators
from bench.load.planning import Options, recipe_of
from bench.load.record import RequestRecord, read_run
from bench.load.run import Plan, execute
from bench.load.sweep import read_sweep
from bench.load.workload.arrival import Gamma, Poisson, Ramp
from bench.load.workload.prompts import Api, Dialect, tokens_of, words_of
from bench.load.workload.schedule import draw
from bench.load.workload.sessions import Cancellations, Documents, Lengths, Segment, Sessions
from bench.load.workload.specs import arrival_of, cancellations_of, workload_of
from launcher.__main__ import main
from protocol.errors import ConfigError
from tests.bench.records import record
from tests.bench.toy_server import ToyConfig

START = Callable[..., str]
QUICK = ToyConfig(base_s=0.005, prefill_s_per_1k=0.0, token_s=0.001)


def test_a_run_over_two_processes(toy: START) -> None:
    target = discover(toy(QUICK), Dialect(""))
    assert (target.name, target.dialect.extensions) == ("toy", True)
    assert num_accelerators(target) is None
    workload = Sessions(first="20", message="5", turns="2", output="4", think_s="0.01")
    schedule = draw(workload, Poisson(40.0), 3, duration_s=1.0)
    seen: list[Progress] = []

    def watch(progress: Progress) -> bool:
        seen.append(progress)
        return False

    plan = Plan(target, schedule, {"kind": "sessions"}, {"kind": "poisson"}, num_processes=2)
    manifest, records = execute(plan, watch)
    assert [record.index for record in records] == [p.index for p in schedule.requests]
    assert {record.outcome for record in records} == {"ok"}
    assert {record.num_prompt_tokens for record in records} == {20, 29}
    assert all(record.timeline is not None for record in records)
    assert manifest.schedule_sha256 == schedule.sha256
    assert manifest.metrics_version == METRICS_VERSION
    assert manifest.driver["num_processes"] == 2

    assert not [reason for reason in manifest.invalid_reasons if "Little" in reason]
    assert seen[-1].num_sent == len(records)
    assert seen[-1].outcomes == {"ok": len(records)}
    assert sum(len(progress.ttfts_s) for progress in seen) == len(records)


def test_a_strict_server_is_asked_plainly(toy: START) -> None:
    target = discover(toy(replace(QUICK, is_strict=True)), Dialect("", Api.CHAT), name="strict")
    assert not target.dialect.extensions
    schedule = draw(Lengths("9", "3"), Poisson(20.0), 0, duration_s=0.5)
    _, records = execute(Plan(target, schedule, {}, {}, wants_timelines=False))
    assert {(r.target, r.outcome, r.token_counts) for r in records} == {("strict", "ok", (1, 1, 1))}


def test_nobody_answers() -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:9"):
        discover("http://127.0.0.1:9", Dialect(""))
    with pytest.raises(ConfigError, match="no API"):
        api_of("grpc")


def test_the_run_command(toy: START, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = toy(replace(QUICK, failure_rate=0.2))
    slo = tmp_path / "slo.yaml"
    slo.write_text("slo: {document: {ttft_s: 9, target: 0.999}, question: {ttft_s: 9}}")
    flags = ["--url", url, "--workload", "documents:document=50,questions=2,think_s=0.01,output=3"]
    flags += [
        "--rate",
        "40",
        "--duration",
        "1",
        "--slo",
        str(slo),
        "--api-key",
        "secret",
        "--check",
    ]
    code = main(["bench", "run", *flags, "--check", "--output", str(tmp_path / "run")])
    manifest, records = read_run(tmp_path / "run")
    assert "secret" not in (tmp_path / "run" / "manifest.json").read_text()
    assert code == (4 if manifest.valid else 3)
    assert manifest.workload["document"] == "50"
    assert manifest.arrival == {"kind": "poisson", "rate": 40.0}
    assert manifest.command.startswith("baton bench run --url http://127.0.0.1")
    assert msgspec.convert(manifest.slo, Slo).of("document").target == 0.999
    summary = summarise(records, msgspec.convert(manifest.slo, Slo))
    assert summary.outcomes["http_error"] > 0
    assert summary.outcomes.get("unsent", 0) > 0
    assert summary.attains is False
    shown = capsys.readouterr().out
    for word in ("open loop", "document", "attainment", "✗", "http error"):
        assert word in shown


def test_a_run_over_https(
    toy: START, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(
        str(tmp_path / "server.pem")
    )
    url = toy(QUICK, "--tls", str(tmp_path / "server.pem"))
    assert url.startswith("https://")
    flags = ["bench", "run", "--url", url, "--workload", "lengths:prompt=8,output=4"]
    flags += ["--rate", "50", "--requests", "20", "--output", str(tmp_path / "run")]
    assert main(flags) == 2
    assert "certificate" in capsys.readouterr().err
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    assert main(flags) in (0, 3)  # a busy machine may make it late
    _, records = read_run(tmp_path / "run")
    assert {record.outcome for record in records} == {"ok"}
    assert {record.num_output_tokens for record in records} == {4}
    assert all(record.timeline is not None for record in records)


def test_the_sweep_command(toy: START, tmp_path: Path) -> None:
    slo = tmp_path / "slo.yaml"
    slo.write_text("slo: {default: {ttft_s: 30, target: 0.9}}")  # a busy machine meets it too
    for name, failures in (("good", 0.0), ("bad", 0.5)):
        url = toy(replace(QUICK, failure_rate=failures))
        flags = ["--url", url, "--workload", "lengths:prompt=8,output=1", "--slo", str(slo)]
        flags += ["--rates", "60,90", "--min-requests", "30", "--rounds", "2"]
        flags += ["--accelerators", "2"]
        assert main(["bench", "sweep", *flags, "--output", str(tmp_path / name)]) == 0
        sweep = read_sweep(tmp_path / name)
        assert [point.rate for point in sweep.points] == [60.0, 90.0]
        assert {point.verdict.passed for point in sweep.points} == {name == "good"}
        assert {point.verdict.is_sure for point in sweep.points} == {name == "bad"}
        assert sweep.num_accelerators == 2
        for point in sweep.points:
            for folder in point.folders:
                manifest, records = read_run(tmp_path / name / folder)
                assert manifest.arrival["rate"] == point.rate
                assert len(records) == 15


@pytest.mark.slow
def test_goodput_is_found(toy: START, tmp_path: Path) -> None:
    """One slot, 20 ms a request: M/D/1, whose waits are known."""
    url = toy(ToyConfig(0.02, prefill_s_per_1k=0.0, token_s=0.0, num_slots=1))
    slo = tmp_path / "slo.yaml"
    slo.write_text("slo: {default: {ttft_ms: 60, target: 0.9}}")
    flags = ["--url", url, "--workload", "lengths:prompt=8,output=1", "--slo", str(slo)]
    flags += ["--rate", "20", "--min-requests", "900", "--tolerance", "0.1"]
    assert main(["bench", "sweep", *flags, "--output", str(tmp_path / "sweep")]) == 0
    sweep = read_sweep(tmp_path / "sweep")
    assert sweep.low is not None
    assert sweep.high is not None
    # the same queue as in test_goodput.py, five times as fast: its knee lies at about 5 * 5.9
    assert 24 < sweep.low < sweep.high < 36


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["run", "--rate", "1"], "say how long"),
        (["run", "--requests", "3"], "rate"),
        (["run", "--rate", "1", "--requests", "3", "--workload", "nope"], "lengths, prefix_tree"),
        (["run", "--rate", "1", "--requests", "3", "--slo", "nope"], "presets"),
        (["run", "--users", "2"], "--requests"),
        (["run", "--trace", "/nowhere"], "/nowhere"),
        (["sweep", "--slo", "guidellm-chat"], "--output"),
        (["sweep", "--output", "o"], "--slo"),
        (["sweep", "--output", "o", "--rates", "a"], "--rates"),
        (["sweep", "--output", "o", "--slo", "guidellm-chat", "--users", "3"], "open loop"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *flags, "--url", "http://127.0.0.1:9"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_specs(tmp_path: Path) -> None:
    assert workload_of("documents:document=99,think_s=1") == Documents("99", think_s="1")
    path = tmp_path / "w.yaml"
    path.write_text("kind: lengths\nprompt: 7\n")
    assert workload_of(str(path)) == Lengths("7")
    assert arrival_of("gamma:cv=3", 2.0) == Gamma(2.0, 3.0)
    assert arrival_of("ramp:1-2-3,2-2-9", None) == Ramp(((1.0, 2.0, 3.0), (2.0, 2.0, 9.0)))
    assert cancellations_of("0.5:3") == Cancellations(0.5, "3")
    for spec in ("lengths:nope=3", "lengths:prompt", "lengths:prompt=x", "mixed:long_share=3"):
        with pytest.raises(ConfigError):
            workload_of(spec)
    for spec in ("poisson", "nope", "gamma:cv=x", "ramp:1-2", "gamma:sv=3"):
        with pytest.raises(ConfigError):
            arrival_of(spec, None if spec == "poisson" else 1.0)


def test_a_trace_keeps_its_order_at_another_rate(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 500 * n, "input_length": 600, "output_length": 4, "hash_ids": [0, n]}
        for n in range(20)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    recipe = recipe_of(Options(trace=str(path), scale=0.1))
    assert recipe.schedule(0).duration_s == pytest.approx(9.5)
    faster = recipe.schedule(0, rate=4.0, requests=10)
    assert len(faster.requests) == 10
    assert faster.duration_s == pytest.approx(9 / 4)
    assert recipe.schedule(0).requests[0].what.segments[0] == Segment("block/0", 51)


def test_tokens_are_the_same_for_everybody() -> None:
    tokens = tokens_of(7, Segment("a", 100), (32, 256))
    assert tokens[:6] == tokens_of(7, Segment("a", 6), (32, 256))
    assert tuple(tokens[:4]) == TOKENS
    assert tokens != tokens_of(8, Segment("a", 100), (32, 256))
    assert all(32 <= token < 256 for token in tokens)
    assert len(words_of(0, Segment("a", 50)).split()) == 50


TOKENS = (91, 249, 194, 171)  # for ever: another host, another year


def test_how_many_processes() -> None:
    small = draw(Lengths("9", "10"), Poisson(50.0), 0, duration_s=10.0)
    large = draw(Lengths("9", "1000"), Poisson(50.0), 0, duration_s=10.0)
    assert num_processes_for(small, 8) == 1
    assert num_processes_for(large, 8) == 3
    assert num_processes_for(large, 2) == 1


def test_progress_adds_up_and_tells_nothing_twice() -> None:
    parts = [Progress(5, 3, 1, 10, 1, {"ok": 2}, [0.1]), Progress(5, 2, 0, 5, 0, {"ok": 1}, [0.2])]
    assert total(parts) == Progress(10, 5, 1, 15, 1, {"ok": 3}, [0.1, 0.2])
    assert total(parts).ttfts_s == []


def _record(index: int, lag_s: float) -> RequestRecord:
    at = float(index)
    sent = at + lag_s
    return record(index, lag_s + 0.1, gaps_s=(0.1,), at_s=at, sent_s=sent, kind="k")


AUDIT = Audit(100.0, 0.5, 0.001, 0.2, 1, False)


def test_a_run_judges_itself() -> None:
    good = [_record(n, 0.001) for n in range(100)]
    assert invalid_reasons(good, [AUDIT], 100, None) == []
    busy = replace(AUDIT, cpu_share=0.81)
    assert "81%" in invalid_reasons(good, [AUDIT, busy], 100, None)[0]
    asleep = replace(AUDIT, loop_lag_s=0.02)
    assert "not looking" in invalid_reasons(good, [asleep], 100, None)[0]
    lost = replace(AUDIT, mean_in_flight=0.3)
    assert "Little" in invalid_reasons(good, [lost], 100, None)[0]
    assert invalid_reasons(good, [AUDIT], 101, None) == ["100 records of 101 requests"]
    late = [_record(n, 0.02 if n < 2 else 0.0) for n in range(100)]
    assert "late" in invalid_reasons(late, [AUDIT], 100, None)[0]
    assert send_lag(late) == {"p50": 0.0, "p99": pytest.approx(0.02), "max": pytest.approx(0.02)}


def test_how_late_is_late() -> None:
    records = [_record(n, 0.0) for n in range(9)]
    assert lag_limit_s(records, None) == pytest.approx(0.005)  # 5 % of 100 ms
    assert lag_limit_s([], None) == 0.005
    slo = Slo({"a": Objective(Deadline(0.4, 0.1)), "b": Objective(None, 0.001, Deadline(0.2))})
    assert lag_limit_s(records, slo) == pytest.approx(0.01)
    assert send_lag([]) == {"p50": 0.0, "p99": 0.0, "max": 0.0}


def test_the_busiest_five_seconds() -> None:
    idle_then_busy = [(float(t), 0.1 * min(t, 20) + 0.9 * max(0, t - 20)) for t in range(31)]
    assert largest_share(idle_then_busy, 5.0) == pytest.approx(0.9)
    assert largest_share([(0.0, 0.0), (2.0, 1.0)], 5.0) == pytest.approx(0.5)
    assert largest_share([(0.0, 0.0)], 5.0) == 0.0
