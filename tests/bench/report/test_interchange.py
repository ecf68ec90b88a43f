"""What other harnesses write comes in, and what we write out comes back the same."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.load.analysis.metrics import e2e_of, summarise, ttft_of, ttft_sent_of
from bench.load.analysis.slo import tpot_of
from bench.load.interchange.aiperf import export_aiperf, import_aiperf
from bench.load.interchange.vllm import export_vllm, import_vllm
from bench.load.record import Manifest, RequestRecord
from protocol.errors import ConfigError
from tests.bench.example import sample_run


def _one_target() -> tuple[Manifest, list[RequestRecord]]:
    manifest, records = sample_run(seed=3, rate=4.0, duration_s=20.0)
    own = [record for record in records if record.target == "disaggregated"]
    slow = msgspec.structs.replace(own[4], outcome="timeout", status=None, error_code="read")
    return manifest, [*own[:4], slow, *own[5:]]


def _write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def _lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_vllm_and_back(tmp_path: Path) -> None:
    manifest, records = _one_target()
    path = _write(tmp_path / "vllm.json", export_vllm(manifest, records))
    back_manifest, back = import_vllm(path)
    first_s = min(record.intended_s for record in records)
    asked = sorted(records, key=lambda record: record.sent_s)
    assert len(back) == len(asked)
    for before, after in zip(asked, back, strict=True):
        assert after.intended_s == pytest.approx(before.intended_s - first_s, abs=1e-9)
        assert (after.outcome == "ok") == (before.outcome == "ok")
        assert after.num_prompt_tokens == before.num_prompt_tokens
        if before.outcome == "ok":
            assert ttft_of(after) == pytest.approx(ttft_of(before), abs=1e-9)
            assert tpot_of(after) == pytest.approx(tpot_of(before), abs=1e-9)
            assert e2e_of(after) == pytest.approx(e2e_of(before), abs=1e-9)
            assert after.token_counts == before.token_counts
    assert not back_manifest.valid
    assert back_manifest.driver == {"imported_from": "vllm bench serve"}


def test_vllm_names_and_definitions() -> None:
    manifest, records = _one_target()
    result = export_vllm(manifest, records)
    answered = [record for record in records if record.outcome == "ok"]
    assert result["completed"] == len(answered)
    assert result["failed"] == len(records) - len(answered)
    assert result["num_prompts"] == len(records)
    first = [ttft_sent_of(record) or 0.0 for record in answered]
    assert result["mean_ttft_ms"] == pytest.approx(1e3 * sum(first) / len(first))
    lists = ("input_lens", "output_lens", "ttfts", "itls", "start_times", "errors", "latencies")
    assert {len(result[name]) for name in lists} == {len(records)}
    for name in ("ttft", "tpot", "itl", "e2el"):
        assert {f"{word}_{name}_ms" for word in ("mean", "median", "std", "p99")} <= result.keys()


def test_a_vllm_file_without_details_is_refused(tmp_path: Path) -> None:
    manifest, records = _one_target()
    result = export_vllm(manifest, records)
    del result["itls"]
    with pytest.raises(ConfigError, match="itls: save it with --save-detailed"):
        import_vllm(_write(tmp_path / "a.json", result))
    del result["start_times"]
    result["itls"] = []
    with pytest.raises(ConfigError, match="start_times"):
        import_vllm(_write(tmp_path / "b.json", result))


def test_vllm_lists_of_different_lengths_are_refused(tmp_path: Path) -> None:
    manifest, records = _one_target()
    result = export_vllm(manifest, records)
    result["ttfts"].pop()
    with pytest.raises(ConfigError, match="not what vllm bench serve writes"):
        import_vllm(_write(tmp_path / "a.json", result))


def test_events_of_several_tokens_claim_no_time_per_token(tmp_path: Path) -> None:
    manifest, records = _one_target()
    result = export_vllm(manifest, records)
    result["output_lens"] = [2 * length for length in result["output_lens"]]
    _, back = import_vllm(_write(tmp_path / "a.json", result))
    metrics = summarise(back, None).metrics
    assert "itl_s" not in metrics
    assert metrics["icl_s"].count > 0


def test_aiperf_and_back(tmp_path: Path) -> None:
    manifest, records = _one_target()
    path = _lines(tmp_path / "profile_export.jsonl", list(export_aiperf(manifest, records)))
    back_manifest, back = import_aiperf(path)
    first_s = min(record.intended_s for record in records)
    asked = sorted(records, key=lambda record: record.sent_s)
    for before, after in zip(asked, back, strict=True):
        assert after.intended_s == pytest.approx(before.intended_s - first_s, abs=1e-8)
        assert after.sent_s == pytest.approx(before.sent_s - first_s, abs=1e-8)
        assert after.outcome == before.outcome
        assert (after.session, after.turn) == (before.session, before.turn)
        if before.outcome == "ok":
            assert ttft_of(after) == pytest.approx(ttft_of(before), abs=1e-8)
            assert tpot_of(after) == pytest.approx(tpot_of(before), abs=1e-8)
            assert e2e_of(after) == pytest.approx(e2e_of(before), abs=1e-8)
    assert back_manifest.driver == {"imported_from": "AIPerf"}


def test_aiperf_cancelled_warm_up_and_errors(tmp_path: Path) -> None:
    start = 1_759_813_207_532_900_363
    metadata = {"request_start_ns": start, "request_end_ns": start + 10**9, "turn_index": 0}
    cancelled = {**metadata, "was_cancelled": True, "x_correlation_id": "c"}
    rows: list[dict[str, Any]] = [
        {"metadata": {**metadata, "benchmark_phase": "warmup"}, "metrics": {}, "error": None},
        {"metadata": cancelled, "metrics": None, "error": {"code": 499, "type": "Cancelled"}},
        {"metadata": metadata, "metrics": None, "error": {"code": 503, "type": "HTTPError"}},
        {"metadata": metadata, "metrics": None, "error": {"code": None, "type": "TimeoutError"}},
        {
            "metadata": {**metadata, "credit_issued_ns": start - 10**9},
            "metrics": {
                "time_to_first_token": {"value": 250.0, "unit": "ms"},
                "inter_token_latency": {"value": 10.0, "unit": "ms"},
                "output_sequence_length": {"value": 11, "unit": "tokens"},
            },
            "error": None,
        },
    ]
    _, records = import_aiperf(_lines(tmp_path / "a.jsonl", rows))
    assert [r.outcome for r in records] == ["cancelled", "http_error", "timeout", "ok"]
    assert records[1].status == 503
    assert ttft_of(records[3]) == pytest.approx(1.25)  # it was due a second before
    assert tpot_of(records[3]) == pytest.approx(0.01)


@pytest.mark.parametrize("content", ["", "[]", "{}\n", '{"metadata": 1}', "not json", "\x00"])
def test_other_files_are_refused_or_empty(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file"
    path.write_text(content)
    with pytest.raises(ConfigError):
        import_vllm(path)
    if content:
        with pytest.raises(ConfigError):
            import_aiperf(path)


def test_no_file(tmp_path: Path) -> None:
    for read in (import_vllm, import_aiperf):
        with pytest.raises(ConfigError, match="No such file"):
            read(tmp_path / "none")
