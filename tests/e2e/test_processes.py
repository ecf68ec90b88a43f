"""What a cluster leaves behind: nothing, whatever ends it."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO

import httpx
import pytest

from bench.load.local_cluster import descendants
from protocol.process.folders import remove_dead
from tests.e2e.cluster import is_gone, wait_until

MODEL = "arithmetic:layers=2,heads=2,kv_heads=2,vocab=512,max_len=1024"


def _serve(tmp_path: Path, *flags: str, stderr: IO[str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "launcher", "serve", MODEL, "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )


@pytest.mark.cluster
def test_a_killed_launcher_leaves_no_process(tmp_path: Path) -> None:
    process = _serve(tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready ")
    children = descendants(process.pid)
    assert len(children) == 5, "a coordinator and its reader of texts, a fork server, two ranks"
    process.kill()
    process.wait(10)
    process.stdout.close()
    wait_until(lambda: all(is_gone(pid) for pid in children), "a child outlives its launcher")
    assert list(tmp_path.glob("baton-*/coordinator.json"))
    assert remove_dead("baton-", tmp_path) == 1, "the next launcher removes what is left"
    assert not list(tmp_path.iterdir())


@pytest.mark.cluster
def test_ctrl_c_leaves_nothing_and_quiet_says_nothing_before(tmp_path: Path) -> None:
    said, runtime = tmp_path / "stderr", tmp_path / "r"
    runtime.mkdir()
    with said.open("w") as stderr:
        process = _serve(runtime, "--quiet", stderr=stderr)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready ")
    children = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    process.stdout.close()
    assert all(is_gone(pid) for pid in children)
    assert not list(runtime.iterdir()), "the folder of sockets and configurations"
    assert "serving" not in said.read_text().split("\n")


@pytest.mark.cluster
def test_a_cluster_that_nobody_listens_to_serves(tmp_path: Path) -> None:
    """Its standard error is a full pipe, its log files are on a full disk, callers make noise."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    while True:
        try:
            os.write(write, b"x" * 4096)
        except BlockingIOError:
            break
    os.set_blocking(write, True)
    logs = tmp_path / "logs"
    logs.mkdir()
    for name in ("coordinator", "prefill0.0", "decode0.0"):
        (logs / f"{name}.log").symlink_to("/dev/full")
    flags = ("--port", "0", "--log-dir", str(logs))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "launcher", "serve", MODEL, *flags],
        stdout=subprocess.PIPE,
        stderr=write,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[1]
        process.stdout.close()  # nobody reads that any more, either
        with httpx.Client(base_url=url, timeout=60.0) as client:
            host, _, port = url.removeprefix("http://").partition(":")
            for _ in range(300):
                with socket.create_connection((host, int(port))) as connection:
                    connection.sendall(b"no HTTP\r\n\r\n")
            answer = client.post("/v1/completions", json={"prompt": [1, 2], "max_tokens": 2})
            assert answer.status_code == 200

            def is_counted() -> bool:
                pattern = r'baton_log_lines_dropped_total{process="coordinator"} (\S+)'
                found = re.search(pattern, client.get("/metrics").text)
                return found is not None and float(found[1]) > 200

            wait_until(is_counted, "the lines of the noise are dropped, and counted")
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        os.close(read)
        os.close(write)
