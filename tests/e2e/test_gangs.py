"""Processes of a cluster die and stop while requests run: the rest goes on, and they come back.

One cluster for all tests of a kind: each leaves it whole, which is what it asserts.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from modeling.arithmetic import expected_tokens
from modeling.checkpoint.config import load_config

MODEL = "arithmetic:layers=2,heads=2,kv_heads=2,vocab=512,max_len=4096"
CONFIG = load_config(MODEL)
BACK_S = 90.0  # a gang's start, on a machine that is busy with other things
LONG = 1200  # tokens of an answer that takes seconds
DECODING = 10  # tokens of an answer whose KV has been handed over
COORDINATOR = "coordinator"
# What is tested is what follows, not how long a cluster waits before: ranks give a coordinator up
# after a second and a half, and the launcher does after three times as long.
QUICK = (
    *("--set", "prefill_pool.coordinator_timeout_s=1.5"),
    *("--set", "decode_pool.coordinator_timeout_s=1.5"),
    *("--set", "coordinator_silence_s=4.5"),
)

pytestmark = pytest.mark.cluster


class Stream(threading.Thread):
    """A streamed completion that somebody reads while the test does other things."""

    def __init__(self, url: str, prompt: list[int], max_tokens: int) -> None:
        super().__init__(daemon=True)
        self.prompt, self.max_tokens = prompt, max_tokens
        self.path = ""
        self.token_ids: list[int] = []
        self.error = ""  # the code of an error event, or of a broken connection
        self.is_done = False  # [DONE] was said
        self._url = url
        self._begun = threading.Event()
        self.start()

    def run(self) -> None:
        body = {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
        }
        try:
            with (
                httpx.Client(base_url=self._url, timeout=120.0) as client,
                client.stream("POST", "/v1/completions", json=body) as reply,
            ):
                self.path = reply.headers.get("x-baton-path", "")
                for line in reply.iter_lines():
                    self._take(line.removeprefix("data: "))
        except httpx.TransportError as error:
            self.error = self.error or type(error).__name__
        finally:
            self._begun.set()

    def _take(self, event: str) -> None:
        if event == "[DONE]":
            self.is_done = True
        elif event.startswith("{"):
            said = json.loads(event)
            if "error" in said:
                self.error = said["error"]["code"]
            for choice in said.get("choices", ()):
                self.token_ids += choice.get("token_ids") or []
            if len(self.token_ids) > DECODING:  # the first one comes from the prefill pool
                self._begun.set()

    def wait_begun(self) -> str:
        """Wait until it is being decoded; the pool that does."""
        assert self._begun.wait(60), "no tokens"
        return dict(part.strip().partition("=")[::2] for part in self.path.split(";"))["decode"]

    def check_exact(self) -> None:
        self.join(120)
        assert (self.error, self.is_done) == ("", True)
        assert self.token_ids == expected_tokens(CONFIG, self.prompt, self.max_tokens)

    def check_end(self, *codes: str) -> None:
        """It ended whole and exact, or with one of these errors and nothing wrong before it."""
        self.join(120)
        if self.error:
            assert self.error in codes
            assert not self.is_done
        else:
            assert self.is_done
        expected = expected_tokens(CONFIG, self.prompt, self.max_tokens)
        assert self.token_ids == expected[: len(self.token_ids)]
        assert self.error or len(self.token_ids) == self.max_tokens


class Cluster:
    """A running cluster whose processes can be hurt by name."""

    def __init__(self, running: Any, until: Any, no_leaks: Any) -> None:
        self.running = running
        self._until = until
        self._no_leaks = no_leaks
        self._rng = random.Random(7)

    def pids(self) -> dict[str, int]:
        """Process ids by name: ``coordinator``, ``prefill0.0``, ..."""
        launcher = self.running.process.pid
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        found = {}
        for pid in children:
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if "--config" in words:
                    found[Path(words[words.index("--config") + 1]).stem] = int(pid)
        return found

    def prompt(self, length: int = 300) -> list[int]:
        return [self._rng.randrange(500) for _ in range(length)]

    def stream(self, max_tokens: int = LONG) -> Stream:
        return Stream(self.running.url, self.prompt(), max_tokens)

    def pools(self) -> dict[str, Any]:
        return {pool["pool_id"]: pool for pool in self.running.cluster()["pools"]}

    def check_exact(self, length: int = 300, **expected_path: str) -> None:
        """A new request is answered exactly, and went this way."""
        prompt = self.prompt(length)
        answer = self.running.complete(prompt, 8)
        assert answer["choices"][0]["token_ids"] == expected_tokens(CONFIG, prompt, 8)
        assert expected_path.items() <= answer["path"].items(), answer["path"]

    def wait_lost(self, pool_id: str, epoch: int) -> float:
        """Wait until the pool is not of that epoch any more; how long that took."""
        started = time.monotonic()
        self._until(lambda: self.pools()[pool_id]["epoch"] > epoch, f"{pool_id} is lost", 30.0)
        return time.monotonic() - started

    def wait_whole(self) -> None:
        """Wait until every pool serves and nothing is held by anybody."""

        def is_whole() -> bool:
            with contextlib.suppress(httpx.TransportError, json.JSONDecodeError):
                pools = self.pools().values()
                return all(pool["serving"] for pool in pools)
            return False

        self._until(is_whole, "every pool serves", BACK_S)
        # A loop that stood still is not ready for some seconds more.
        self._until(lambda: self.running.client.get("/ready").status_code == 200, "ready", BACK_S)
        self.check_exact()
        self._no_leaks(self.running)
        state = self.running.cluster()
        assert (state["num_active_requests"], state["num_leaked"]) == (0, 0)
        assert len(self.pids()) == 6

    def wait_gone(self, pid: int) -> None:
        self._until(lambda: not Path(f"/proc/{pid}").exists(), f"process {pid} ends", 20.0)


@pytest.fixture(scope="module")
def shared(start_cluster: Any, until: Any, no_leaks: Any) -> Iterator[Cluster]:
    flags = (
        *("--prefill", "cp2", "--decode", "tp2", "--decode", "tp1", "--kv-memory", "8MiB"),
        *("--block-size", "16", "--checksum", "always", "--set", "restart_budget=50"),
        *("--set", "restart_window_s=60", *QUICK),
        *("--set", "coordinator.heartbeat_timeout_s=2.5"),
        *("--set", "coordinator.rejoin_timeout_s=3"),
    )
    with start_cluster(MODEL, *flags) as running:
        yield Cluster(running, until, no_leaks)


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    shared.wait_whole()
    yield shared
    assert shared.running.process.poll() is None


def hurt(pid: int, number: signal.Signals) -> None:
    """Send a signal, and see that it has taken effect."""
    os.kill(pid, number)
    if number is signal.SIGSTOP:
        deadline = time.monotonic() + 10
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline


def test_a_killed_decode_follower(cluster: Cluster) -> None:
    """Its gang starts again; what the other decode pool streams goes on."""
    streams = [cluster.stream() for _ in range(2)]
    by_pool = {stream.wait_begun(): stream for stream in streams}
    assert set(by_pool) == {"decode0", "decode1"}
    pids, epoch = cluster.pids(), cluster.pools()["decode0"]["epoch"]
    hurt(pids["decode0.1"], signal.SIGKILL)
    cluster.wait_lost("decode0", epoch)
    cluster.wait_gone(pids["decode0.0"])
    assert cluster.running.client.get("/ready").status_code == 200
    cluster.check_exact(decode="decode1")
    by_pool["decode1"].check_exact()
    by_pool["decode0"].check_end("worker_lost")
    cluster.wait_whole()
    new = cluster.pids()
    assert {name for name in pids if new[name] != pids[name]} == {"decode0.0", "decode0.1"}
    streams = [cluster.stream(50) for _ in range(2)]
    assert {stream.wait_begun() for stream in streams} == {"decode0", "decode1"}
    for stream in streams:
        stream.check_exact()


def test_a_killed_prefill_leader(cluster: Cluster) -> None:
    """While it is away, the decode pools compute prompts themselves."""
    pids, epoch = cluster.pids(), cluster.pools()["prefill0"]["epoch"]
    streams = [cluster.stream() for _ in range(2)]
    for stream in streams:
        stream.wait_begun()
    hurt(pids["prefill0.0"], signal.SIGKILL)
    cluster.wait_lost("prefill0", epoch)
    cluster.check_exact(local="")
    for stream in streams:
        stream.check_exact()
    cluster.wait_whole()
    cluster.check_exact(prefill="prefill0")


@pytest.mark.parametrize("name", ["prefill0.1", "decode0.0"])
def test_a_stopped_rank(cluster: Cluster, name: str) -> None:
    """It dies although it does nothing any more; requests that it had end, others go on."""
    pool_id = name.partition(".")[0]
    pids, epoch = cluster.pids(), cluster.pools()[pool_id]["epoch"]
    hurt(pids[name], signal.SIGSTOP)
    streams = [cluster.stream(40) for _ in range(4)]
    took_s = cluster.wait_lost(pool_id, epoch)
    assert took_s < 12, "three seconds, on a machine with nothing else to do"
    for stream in streams:
        stream.check_end("worker_lost", "handoff_failed", "stale_target")
    cluster.wait_gone(pids[name])
    cluster.wait_whole()


@pytest.mark.parametrize("name", ["prefill0.1", "decode0.0"])
def test_a_rank_that_pauses(cluster: Cluster, name: str) -> None:
    """Its requests go on elsewhere; when it runs again its gang is the same, and what it cached."""
    pool_id = name.partition(".")[0]
    before, pids = cluster.pools(), cluster.pids()
    hurt(pids[name], signal.SIGSTOP)
    streams = [cluster.stream(40) for _ in range(2)]
    cluster.wait_lost(pool_id, before[pool_id]["epoch"])
    os.kill(pids[name], signal.SIGCONT)
    for stream in streams:
        stream.check_end("worker_lost", "handoff_failed", "stale_target")
    cluster.wait_whole()
    assert cluster.pids() == pids
    assert cluster.pools()[pool_id]["gang_start"] == before[pool_id]["gang_start"]
    for _ in range(3):
        cluster.check_exact()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_coordinator_that_is_gone(cluster: Cluster, number: signal.Signals) -> None:
    """The next one listens at the same addresses; the gangs are the same, with what they cached."""
    before, pids = cluster.running.cluster(), cluster.pids()
    prompt = cluster.prompt()
    cluster.running.tokens(prompt, 4)
    streams = [cluster.stream() for _ in range(2)]
    for stream in streams:
        stream.wait_begun()
    hurt(pids[COORDINATOR], number)
    cluster.wait_gone(pids[COORDINATOR])
    for stream in streams:
        stream.join(60)
        assert stream.error
        assert not stream.is_done
    cluster.wait_whole()
    new = cluster.pids()
    assert {name for name in pids if new[name] != pids[name]} == {COORDINATOR}
    after = cluster.running.cluster()
    assert after["coordinator_epoch"] > before["coordinator_epoch"]
    for old, pool in zip(before["pools"], after["pools"], strict=True):
        assert pool["epoch"] > old["epoch"]
    answer = cluster.running.complete(prompt, 4)
    assert answer["choices"][0]["token_ids"] == expected_tokens(CONFIG, prompt, 4)
    assert int(answer["path"]["cached"]) >= len(prompt) // 16 * 16 - 16


def test_a_coordinator_that_pauses(cluster: Cluster) -> None:
    """Its ranks give it up; it takes them up again, as it would another's."""
    before, pids = cluster.running.cluster(), cluster.pids()
    stream = cluster.stream()
    stream.wait_begun()
    hurt(pids[COORDINATOR], signal.SIGSTOP)
    threading.Event().wait(2.5)  # the fault itself: longer than ranks wait, shorter than launchers
    os.kill(pids[COORDINATOR], signal.SIGCONT)
    stream.check_end("worker_lost")
    cluster.wait_whole()
    assert cluster.pids() == pids
    after = cluster.running.cluster()
    assert after["coordinator_epoch"] == before["coordinator_epoch"]
    assert all(
        pool["epoch"] > old["epoch"]
        for old, pool in zip(before["pools"], after["pools"], strict=True)
    )


def test_a_coordinator_and_a_rank_at_once(cluster: Cluster) -> None:
    """Nobody is there to miss the rank but the launcher."""
    pids, stream = cluster.pids(), cluster.stream()
    stream.wait_begun()
    hurt(pids[COORDINATOR], signal.SIGKILL)
    hurt(pids["decode0.1"], signal.SIGKILL)
    cluster.wait_gone(pids["decode0.0"])
    cluster.wait_whole()
    new = cluster.pids()
    changed = {name for name in pids if new[name] != pids[name]}
    assert changed == {COORDINATOR, "decode0.0", "decode0.1"}


# -- a coordinator that is busy, and one that is asked to end --------------------------------------


def test_a_busy_coordinator_and_the_end(start_cluster: Any, until: Any) -> None:
    """Its GIL is held for longer than ranks and launcher would wait for a dead one: nobody minds.
    A signal to every process of the cluster ends it when what runs has ended."""
    flags = (
        *("--prefill", "cp1", "--decode", "tp1", "--kv-memory", "8MiB", "--block-size", "16"),
        *("--checksum", "always", *QUICK),
        *("--set", "coordinator.failpoints=loop.reserve:hold=6@3"),
    )
    with start_cluster(MODEL, *flags) as running:
        cluster = Cluster(running, until, None)
        before, pids = running.cluster(), cluster.pids()
        streams = [cluster.stream() for _ in range(2)]
        for stream in streams:
            stream.wait_begun()
        cluster.stream(20).check_exact()  # its Reserve is the third
        after = running.cluster()
        assert after["counters"]["failpoint:loop.reserve:hold"] == 1
        assert after["loop"]["lag_s"] > 5
        for stream in streams:
            stream.check_exact()
        after = running.cluster()
        assert cluster.pids() == pids
        assert [pool["epoch"] for pool in after["pools"]] == [p["epoch"] for p in before["pools"]]
        assert "baton_attempts_lost_total{" not in running.client.get("/metrics").text
        streams = [cluster.stream() for _ in range(2)]
        for stream in streams:
            stream.wait_begun()
        for pid in (running.process.pid, *pids.values()):
            os.kill(pid, signal.SIGTERM)
        until(lambda: running.client.get("/ready").status_code == 503, "it takes nothing new")
        reply = running.client.post("/v1/completions", json={"prompt": [1]})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shutting_down")
        for stream in streams:
            stream.check_exact()
        assert running.process.wait(20) == 0
        assert not [pid for pid in pids.values() if Path(f"/proc/{pid}").exists()]


# -- without a launcher ----------------------------------------------------------------------------


class Process:
    """A coordinator or a rank that the test itself starts, behind the words of ``prefix``."""

    def __init__(
        self,
        folder: Path,
        module: str,
        name: str,
        fields: dict[str, Any],
        prefix: tuple[str, ...] = (),
    ) -> None:
        file = folder / f"{name}.json"
        file.write_text(json.dumps(fields))
        self.popen = subprocess.Popen(
            [*prefix, sys.executable, "-P", "-m", module, "--config", str(file)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def said(self, key: str) -> str:
        """What its next line with this key says."""
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            if key in (said := json.loads(line)):
                return str(said[key])
        raise AssertionError(f"it ended without saying {key}")

    def end(self) -> None:
        self.popen.kill()
        self.popen.wait()
        assert self.popen.stdout is not None
        self.popen.stdout.close()


def test_a_stale_coordinator(tmp_path: Path, until: Any) -> None:
    """One that slept while another took over finds that out, and its rank never hears it again."""
    shared = {"token": "t", "model": MODEL, "block_size": 16}
    pool = {"pool_id": "decode0", "role": "decode", "cp_size": 1, "tp_size": 1}
    control = f"ipc://{tmp_path}/control"
    fields = shared | {"pools": [pool], "port": 0, "control_listen": control}
    rank_fields = shared | {
        "pool_id": "decode0",
        "control_address": control,
        "listen": f"ipc://{tmp_path}",
        "kv_memory_bytes": 8 << 20,
        "transport": "tcp",
    }
    with contextlib.ExitStack() as stack:

        def start(module: str, name: str, settings: dict[str, Any]) -> Process:
            process = Process(tmp_path, module, name, settings)
            stack.callback(process.end)
            return process

        old = start("coordinator", "old", fields | {"epoch": 1})
        rank = start("decode", "rank", rank_fields)
        old_url = old.said("ready")
        running = Stream(old_url, [3] * 40, LONG)
        running.wait_begun()
        hurt(old.popen.pid, signal.SIGSTOP)
        new = start("coordinator", "new", fields | {"epoch": 2, "is_restart": True})
        url = new.said("ready")
        prompt = [5] * 50
        stream = Stream(url, prompt, LONG)
        stream.wait_begun()
        os.kill(old.popen.pid, signal.SIGCONT)
        assert old.popen.wait(30) == 3
        stream.check_exact()
        running.join(30)
        assert running.error
        assert not running.is_done
        assert rank.popen.poll() is None

        def is_clean() -> bool:
            (state,) = httpx.get(f"{url}/v1/cluster").json()["pools"]
            (space,) = state["blocks"]
            return bool(space["free"] + space["cached"] == space["total"])

        until(is_clean, "no block is held")


def test_restarts_are_used_up(tmp_path: Path, until: Any) -> None:
    """The cluster goes on with what is left, and ends when nothing of it can answer."""
    argv = [
        *(sys.executable, "-P", "-m", "launcher", "serve", MODEL, "--port", "0"),
        *("--prefill", "cp1", "--decode", "tp1", "--kv-memory", "8MiB"),
        *("--set", "restart_budget=0", "--transport", "tcp"),
    ]
    with (
        (tmp_path / "errors").open("w") as log,
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        running = type("Running", (), {"process": process})()
        url = process.stdout.readline().removeprefix("ready ").strip()
        pids = Cluster(running, until, None).pids()
        hurt(pids["prefill0.0"], signal.SIGKILL)
        until(lambda: len(httpx.get(f"{url}/v1/cluster").json()["missing"] or "") > 0, "it is lost")
        assert httpx.get(f"{url}/ready").status_code == 200
        reply = httpx.post(
            f"{url}/v1/completions", json={"prompt": [1] * 300, "max_tokens": 2}, timeout=60
        )
        assert reply.status_code == 200
        hurt(pids["decode0.0"], signal.SIGKILL)
        assert process.wait(30) == 1
    errors = (tmp_path / "errors").read_text()
    assert "prefill0 is given up after 0 restarts" in errors
    assert "error: decode0 is given up after 0 restarts" in errors
    assert "decode0/0 ended with code -9" in errors
    assert not [pid for pid in pids.values() if Path(f"/proc/{pid}").exists()]
