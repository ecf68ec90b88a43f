"""The operator's mistakes: one line that says what, where and what to do; exit code 2."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.forks import shared_forks


def _serve(*flags: str) -> subprocess.CompletedProcess[str]:
    return shared_forks().run("launcher", "serve", *flags, environment=os.environ)


def _assert_one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--prefill", "ring2"), ("--prefill ring2", "cp2")),
        (("--decode", "cp2"), ("--decode cp2", "tp1")),
        (("--prefill", "cp2"), ("no decode pool", "--decode tp1")),
        (("arithmetic", "--decode", "tp3"), ("tp3", "heads")),
        (("--kv-memory", "plenty"), ("--kv-memory plenty", "1GiB")),
        (("arithmetic", "--kv-memory", "1KiB"), ("--kv-memory", "at least")),
        (("--launcher", "slurm"), ("--launcher slurm", "local")),
        (("--disk-io", "tape"), ("--disk-io tape", "vectored", "nixl-posix", "nixl-gds")),
        (("--block-size", "0"), ("--block-size 0",)),
        (("--port", "70000"), ("--port 70000",)),
        (("--set", "nonsense"), ("--set nonsense",)),
        (("--set", "prefill_pool.no_such_thing=1"), ("prefill_pool", "no_such_thing")),
        (("--set", "restart_budget=2"), ("jobs.max_crashes 2", "restart_budget 2")),
        (("--no-such-flag",), ("--no-such-flag",)),
        (("/no/such/folder",), ("/no/such/folder",)),
        (("--host", "0.0.0.0"), ("0.0.0.0", "--api-key")),
    ],
)
def test_one_line_and_code_2(flags: tuple[str, ...], words: tuple[str, ...]) -> None:
    _assert_one_line(_serve(*flags), *words)


def test_an_unknown_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    _assert_one_line(_serve(str(tmp_path)), "GPT2LMHeadModel", "config.json")


def test_a_checkpoint_that_wants_to_run_code(tmp_path: Path) -> None:
    config = {"architectures": ["EvilForCausalLM"], "auto_map": {"AutoModel": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    _assert_one_line(_serve(str(tmp_path)), "auto_map")


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        _assert_one_line(_serve("arithmetic", "--port", str(port)), str(port), "in use")
