"""What ``baton config show`` says is what ``baton serve`` would do."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from launcher.__main__ import build_parser, main
from launcher.cli.serve_flags import GROUPS
from launcher.config import ServeConfig, child_environment, coordinator_environment
from launcher.resolved import resolve_cluster
from launcher.supervise.ranks import coordinator_config

TABLES = {"coordinator", "prefill_pool", "decode_pool", "pools", "serving"}


def show(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["config", "show", *argv]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    return shown


def test_every_process_is_told_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    shown = show(
        capsys, "arithmetic", "--resolved", "--prefill", "cp2", "--decode", "tp2",
        "--set", "prefill_pool.chunk_tokens=4096", "--set", "coordinator.session_ttl_s=60.0",
    )  # fmt: skip
    assert shown.keys() == TABLES
    assert shown["prefill_pool"]["chunk_tokens"] == 4096
    assert shown["coordinator"]["session_ttl_s"] == 60.0
    assert (shown["decode_pool"]["device"], shown["decode_pool"]["dtype"]) == ("cpu", "float32")
    assert shown["coordinator"]["kv_dtype"] == "float32"
    assert [(p["pool_id"], p["cp_size"], p["tp_size"]) for p in shown["pools"]] == [
        ("prefill0", 2, 1),
        ("decode0", 1, 2),
    ]


def test_it_tells_no_secret_and_makes_no_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    for how in ([], ["--resolved"]):
        argv = ["arithmetic", *how, "--data-dir", str(folder), "--api-key", "sesame"]
        shown = show(capsys, *argv)
        assert "sesame" not in json.dumps(shown)
        assert "token" not in shown.get("coordinator", {})
    assert shown["store"]["folder"] == str(folder / "kv")
    assert not folder.exists()


@pytest.mark.parametrize("resolved", [[], ["--resolved"]])
def test_a_mistake_is_one_line(resolved: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--port", "99999", *resolved]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --port 99999") and error.count("\n") == 1


def test_a_setting_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["config", "show", "arithmetic", "--resolved", "--set", "decode_pool.budget=1"]
    assert main(argv) == 2
    assert capsys.readouterr().err == "error: [decode_pool] has no setting budget\n"


def test_a_setting_lies_as_deep_as_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["arithmetic", "--resolved", "--set", "coordinator.limits.max_stops=99"]
    assert show(capsys, *argv)["coordinator"]["limits"]["max_stops"] == 99
    for name, words in (
        ("coordinator.limits.max_stop", ("coordinator", "limits", "max_stop")),
        ("coordinator.limits.max_stops.deeper", ("coordinator", "limits.max_stops")),
        ("port.deeper", ("port",)),
        ("coordinator..limits", ("--set coordinator..limits",)),
    ):
        assert main(["config", "show", "arithmetic", "--resolved", "--set", f"{name}=1"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert all(word in error for word in words), error


def test_every_flag_is_a_field_and_has_a_word_of_help() -> None:
    flags = [flag for _, group in GROUPS for flag in group]
    for name, _, text in flags:
        assert hasattr(ServeConfig(), name[2:].replace("-", "_")), name
        assert text
    assert len({name for name, *_ in flags}) == len(flags)


def test_what_is_not_said_is_left_to_the_file() -> None:
    said = vars(build_parser().parse_args(["serve", "--prefill", "cp2", "--prefill", "cp1"]))
    assert said == {"command": "serve", "prefill": ["cp2", "cp1"], "config": None, "sets": []}


def test_keys_come_from_everywhere_and_are_shown_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    file.write_text("in-the-file\n")
    monkeypatch.setenv("BATON_API_KEYS", "hush-one, hush-two")
    monkeypatch.setenv("BATON_API_KEY", "hush-three")
    serve = ServeConfig(model="arithmetic", decode=("tp1",), api_key=("flag",))
    serve = msgspec.structs.replace(serve, api_key_file=str(file))
    said = json.loads(coordinator_config(resolve_cluster(serve), {}))
    assert said["api_keys"] == ["flag", "hush-one", "hush-two", "hush-three"]
    assert said["api_key_file"] == str(file)
    monkeypatch.setenv("HF_TOKEN", "hush-four")
    ranks = child_environment(1, is_local=True)
    assert [value for value in ranks.values() if "hush-" in value] == ["hush-four"]
    ours = coordinator_environment(is_local=True)
    assert not [value for value in ours.values() if "hush-" in value]
    assert ours["PATH"] == ranks["PATH"]
    flags = ["arithmetic", "--resolved", "--decode", "tp1", "--api-key", "flag"]
    flags += ["--api-key-file", str(file)]
    shown = show(capsys, *flags)
    assert shown["coordinator"]["api_keys"] == ["hidden"] * 4
    assert "hush-" not in json.dumps(shown)
    file.write_text("")
    assert main(["config", "show", *flags]) == 2
    assert "no key" in capsys.readouterr().err


def test_the_coordinator_gives_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLIBC_TUNABLES", "PYTHONMALLOC"):
        monkeypatch.delenv(name, raising=False)
    ranks = child_environment(1, is_local=True)
    ours = coordinator_environment(is_local=True)
    assert "PYTHONMALLOC" not in ranks and ours["PYTHONMALLOC"] == "malloc"
    assert "trim_threshold=131072" in ours["GLIBC_TUNABLES"] != ranks["GLIBC_TUNABLES"]
    monkeypatch.setenv("PYTHONMALLOC", "pymalloc")
    assert coordinator_environment(is_local=True)["PYTHONMALLOC"] == "pymalloc"
