"""A run's files come back as they were written, and say where they are damaged."""

from pathlib import Path

import pytest

from bench.load.record import (
    FORMAT_VERSION,
    Manifest,
    RequestRecord,
    read_records,
    read_run,
    write_run,
)
from protocol.errors import ConfigError

MANIFEST = Manifest(
    version=FORMAT_VERSION,
    command="baton bench run",
    seed=7,
    workload={"kind": "lengths"},
    arrival={"kind": "poisson", "rate": 2.0},
    targets=[{"name": "a", "url": "http://127.0.0.1:1", "model": "m"}],
    slo=None,
    duration_s=10.0,
    environment={"cpu": "one"},
    started_at="2026-01-01T00:00:00+00:00",
    schedule_sha256="0" * 64,
    valid=False,
    invalid_reasons=["the driver was late"],
    send_lag={"p50": 0.0, "p99": 0.5, "max": 1.0},
    metrics_version="1.0",
)
RECORDS = [
    RequestRecord("a", 0, "s0", 0, "short", 0.0, 0.001),
    RequestRecord(
        target="a",
        index=1,
        session="s1",
        turn=2,
        kind="long",
        intended_s=0.5,
        sent_s=0.5001,
        headers_s=0.51,
        token_times_s=(0.6, 0.7),
        token_counts=(1, 2),
        finished_s=0.71,
        num_prompt_tokens=11,
        num_output_tokens=3,
        num_cached_tokens=0,
        max_tokens=3,
        outcome="ok",
        status=200,
        finish_reason="length",
        request_id="r",
        path="prefill",
        timeline={"events": []},
    ),
]


def test_a_run_survives_the_disk(tmp_path: Path) -> None:
    write_run(tmp_path / "run", MANIFEST, RECORDS)
    assert read_run(tmp_path / "run") == (MANIFEST, RECORDS)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, MANIFEST, RECORDS)
    path = tmp_path / "requests.jsonl"
    path.write_bytes(path.read_bytes() + b'{"target": 3}\n')
    with pytest.raises(ConfigError, match=r"requests\.jsonl:3: .*str.*int"):
        read_records(path)


def test_a_folder_without_a_run_is_the_operators_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_run(tmp_path)
