"""What a cluster leaves behind: nothing, whatever ends it."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODEL = "arithmetic:layers=2,heads=2,kv_heads=2,vocab=512,max_len=1024"


def _serve(tmp_path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "launcher", "serve", MODEL, "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )


def _descendants(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()]


def _is_gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.cluster
def test_a_killed_launcher_leaves_no_process(tmp_path: Path, until: Any) -> None:
    process = _serve(tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready ")
    children = _descendants(process.pid)
    assert len(children) == 3, "a coordinator and two ranks"
    process.kill()
    process.wait(10)
    process.stdout.close()
    until(lambda: all(_is_gone(pid) for pid in children), "a child outlives its launcher")


@pytest.mark.cluster
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    process = _serve(tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready ")
    children = _descendants(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    process.stdout.close()
    assert all(_is_gone(pid) for pid in children)
    assert not list(tmp_path.iterdir()), "the folder of sockets and configurations"
