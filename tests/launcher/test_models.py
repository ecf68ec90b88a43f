"""Models by name: from the cache, else from the Hub, and one line where neither has it."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.checkpoint import write_llama
from tests.forks import shared_forks
from tests.launcher.hub_server import COMMIT, Hub, serve_hub

NAME = "Qwen/Qwen3-4B"
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 264,
    "max_position_embeddings": 128,
    "dtype": "float32",
}
LOADED = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    write_llama(folder, SHAPE)
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / "consolidated.safetensors").write_bytes(b"once more")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    with serve_hub({NAME: folder, "gated/llama": folder}) as hub:
        yield hub


def _show(
    hub: Hub | str, home: Path, *flags: str, cwd: Path | None = None, offline: bool = False
) -> subprocess.CompletedProcess[str]:
    endpoint = hub if isinstance(hub, str) else hub.url
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": str(int(offline)),
        "OMP_NUM_THREADS": "1",
    }
    argv = ("launcher", "config", "show", *flags, "--resolved")
    return shared_forks().run(*argv, timeout_s=120.0, environment=environment, folder=cwd or home)


def _served(run: subprocess.CompletedProcess[str]) -> tuple[str, list[str]]:
    assert run.returncode == 0, run.stderr
    shown = json.loads(run.stdout)["serving"]
    return shown["model"], shown["names"]


def test_a_name_is_downloaded_once_and_then_found(hub: Hub, tmp_path: Path) -> None:
    hub.fetched.clear()
    snapshot = tmp_path / "hf" / "hub" / "models--Qwen--Qwen3-4B" / "snapshots" / COMMIT
    first = _show(hub, tmp_path, NAME)
    assert _served(first) == (str(snapshot), [NAME])
    assert sorted(hub.fetched) == LOADED
    assert "%" in first.stderr  # the progress bar
    hub.fetched.clear()
    assert _served(_show("http://127.0.0.1:9", tmp_path, NAME, offline=True)) == (
        str(snapshot),
        [NAME],
    )
    (snapshot / "model.safetensors").unlink()  # as a download that was broken off leaves it
    assert _served(_show(hub, tmp_path, NAME, "--served-model-name", "a", "b"))[1] == ["a", "b"]


def test_a_folder_wins_over_a_name(hub: Hub, tmp_path: Path) -> None:
    write_llama(tmp_path / NAME, SHAPE)
    run = _show(hub, tmp_path, NAME)
    assert _served(run) == (str(tmp_path / NAME), ["Qwen3-4B"])
    assert "is a folder here" in run.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("Qwen/Qwen9",), ("Qwen/Qwen9", "no such folder here", "no such model on the Hub")),
        (("gated/llama",), ("gated/llama", "conditions", "hf auth login")),
        ((NAME, "--revision", "v9"), ("at v9", "not that revision")),
        (("arithmetic", "--revision", "v9"), ("--revision v9", "not a model on the Hub")),
    ],
)
def test_what_is_not_there_is_one_line(
    flags: tuple[str, ...], words: tuple[str, ...], hub: Hub, tmp_path: Path
) -> None:
    run = _show(hub, tmp_path, *flags)
    assert run.returncode == 2
    last = run.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    for word in words:
        assert word in last, run.stderr


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_it_says_how(offline: bool, tmp_path: Path) -> None:
    run = _show("http://127.0.0.1:9", tmp_path, NAME, offline=offline)
    assert run.returncode == 2
    last = run.stderr.splitlines()[-1]
    assert last.startswith(f"error: {NAME}: no such folder here, not in the local cache")
    assert f"hf download {NAME}" in last
