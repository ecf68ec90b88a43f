"""Processes of a cluster die and stop while requests run: the rest goes on, and they come back.

One cluster for all tests of a kind: each leaves it whole, which is what it asserts.
"""

import contextlib
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.cluster import (
    COORDINATOR,
    SLOW_STEPS,
    Cluster,
    Json,
    LoneProcess,
    Stream,
    expected,
    parse_path,
    prompt_of,
    run_cluster,
    send,
    wait_until,
)

MODEL = "arithmetic:layers=2,heads=2,kv_heads=2,vocab=512,max_len=4096"
LONG = 300  # tokens of an answer that takes seconds, each of SLOW_STEPS
# What is tested is what follows, not how long a cluster waits before: ranks give a coordinator up
# after a second and a half, and the launcher does after three times as long.
QUICK = (
    *("--set", "prefill_pool.coordinator_timeout_s=1.5"),
    *("--set", "decode_pool.coordinator_timeout_s=1.5"),
    *("--set", "coordinator_silence_s=4.5"),
)

pytestmark = pytest.mark.cluster


RNG = random.Random(7)


def new_prompt() -> list[int]:
    return prompt_of(RNG, 300)


def begin(cluster: Cluster, max_tokens: int = LONG) -> Stream:
    """A stream of a prompt that no cache has."""
    return cluster.stream(new_prompt(), max_tokens)


def check_exact(cluster: Cluster, **path: str) -> None:
    """A new request is answered exactly, and went this way."""
    cluster.check_exact(new_prompt(), **path)


def wait_whole(cluster: Cluster) -> None:
    """Wait until every pool serves and nothing is held by anybody."""
    cluster.wait_serving()
    check_exact(cluster)
    cluster.assert_no_leaks()
    state = cluster.state()
    assert (state["num_active_requests"], state["num_leaked"]) == (0, 0)
    assert len(cluster.pids()) == 6


def wait_gone(pid: int) -> None:
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), f"process {pid} ends")


@pytest.fixture(scope="module")
def shared() -> Iterator[Cluster]:
    flags = (
        *("--prefill", "cp2", "--decode", "tp2", "--decode", "tp1", "--kv-memory", "8MiB"),
        *("--block-size", "16", "--checksum", "always", "--set", "restart_budget=50"),
        *("--set", "restart_window_s=60", *QUICK),
        *("--set", "coordinator.heartbeat_timeout_s=2.5"),
        *("--set", "coordinator.rejoin_timeout_s=3"),
        *("--set", f"decode_pool.failpoints={SLOW_STEPS}"),
    )
    with run_cluster(MODEL, *flags) as running:
        yield running


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    wait_whole(shared)
    yield shared
    assert shared.process.poll() is None


def test_a_killed_decode_follower(cluster: Cluster) -> None:
    """Its gang starts again; what the other decode pool streams goes on."""
    streams = [begin(cluster) for _ in range(2)]
    by_pool = {stream.wait_begun(): stream for stream in streams}
    assert set(by_pool) == {"decode0", "decode1"}
    pids, epoch = cluster.pids(), cluster.pools()["decode0"]["epoch"]
    send(pids["decode0/1"], signal.SIGKILL)
    cluster.wait_lost("decode0", epoch)
    wait_gone(pids["decode0/0"])
    assert cluster.http.get("/ready").status_code == 200
    check_exact(cluster, decode="decode1")
    by_pool["decode1"].check_exact(MODEL)
    by_pool["decode0"].check_end(MODEL, "worker_lost")
    wait_whole(cluster)
    new = cluster.pids()
    assert {name for name in pids if new[name] != pids[name]} == {"decode0/0", "decode0/1"}
    streams = [begin(cluster, 50) for _ in range(2)]
    assert {stream.wait_begun() for stream in streams} == {"decode0", "decode1"}
    for stream in streams:
        stream.check_exact(MODEL)


def test_a_killed_prefill_leader(cluster: Cluster) -> None:
    """While it is away, the decode pools compute prompts themselves."""
    pids, epoch = cluster.pids(), cluster.pools()["prefill0"]["epoch"]
    streams = [begin(cluster) for _ in range(2)]
    for stream in streams:
        stream.wait_begun()
    send(pids["prefill0/0"], signal.SIGKILL)
    cluster.wait_lost("prefill0", epoch)
    check_exact(cluster, local="")
    for stream in streams:
        stream.check_exact(MODEL)
    wait_whole(cluster)
    check_exact(cluster, prefill="prefill0")


@pytest.mark.parametrize("name", ["prefill0/1", "decode0/0"])
def test_a_stopped_rank(cluster: Cluster, name: str) -> None:
    """It dies although it does nothing any more; requests that it had end, others go on."""
    pool_id = name.partition("/")[0]
    pids, epoch = cluster.pids(), cluster.pools()[pool_id]["epoch"]
    send(pids[name], signal.SIGSTOP)
    streams = [begin(cluster, 40) for _ in range(4)]
    took_s = cluster.wait_lost(pool_id, epoch)
    assert took_s < 12, "three seconds, on a machine with nothing else to do"
    for stream in streams:
        stream.check_end(MODEL, "worker_lost", "handoff_failed", "stale_target")
    wait_gone(pids[name])
    wait_whole(cluster)


@pytest.mark.parametrize("name", ["prefill0/1", "decode0/0"])
def test_a_rank_that_pauses(cluster: Cluster, name: str) -> None:
    """Its requests go on elsewhere; when it runs again its gang is the same, and what it cached."""
    pool_id = name.partition("/")[0]
    before, pids = cluster.pools(), cluster.pids()
    send(pids[name], signal.SIGSTOP)
    streams = [begin(cluster, 40) for _ in range(2)]
    cluster.wait_lost(pool_id, before[pool_id]["epoch"])
    os.kill(pids[name], signal.SIGCONT)
    for stream in streams:
        stream.check_end(MODEL, "worker_lost", "handoff_failed", "stale_target")
    wait_whole(cluster)
    assert cluster.pids() == pids
    assert cluster.pools()[pool_id]["gang_start"] == before[pool_id]["gang_start"]
    for _ in range(3):
        check_exact(cluster)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_coordinator_that_is_gone(cluster: Cluster, number: signal.Signals) -> None:
    """The next one listens at the same addresses; the gangs are the same, with what they cached."""
    before, pids = cluster.state(), cluster.pids()
    prompt = new_prompt()
    cluster.tokens(prompt, 4)
    streams = [begin(cluster) for _ in range(2)]
    for stream in streams:
        stream.wait_begun()
    send(pids[COORDINATOR], number)
    wait_gone(pids[COORDINATOR])
    for stream in streams:
        stream.join(60)
        assert stream.error
        assert not stream.is_done
    wait_whole(cluster)
    new = cluster.pids()
    assert {name for name in pids if new[name] != pids[name]} == {COORDINATOR}
    after = cluster.state()
    assert after["coordinator_epoch"] > before["coordinator_epoch"]
    for old, pool in zip(before["pools"], after["pools"], strict=True):
        assert pool["epoch"] > old["epoch"]
    answer = cluster.complete(prompt, 4)
    assert answer.token_ids == expected(MODEL, prompt, 4)
    assert int(parse_path(answer.path)["cached"]) >= len(prompt) // 16 * 16 - 16


def test_a_coordinator_that_pauses(cluster: Cluster) -> None:
    """Its ranks give it up; it takes them up again, as it would another's."""
    before, pids = cluster.state(), cluster.pids()
    stream = begin(cluster)
    stream.wait_begun()
    send(pids[COORDINATOR], signal.SIGSTOP)
    threading.Event().wait(2.5)  # the fault itself: longer than ranks wait, shorter than launchers
    os.kill(pids[COORDINATOR], signal.SIGCONT)
    stream.check_end(MODEL, "worker_lost")
    wait_whole(cluster)
    assert cluster.pids() == pids
    after = cluster.state()
    assert after["coordinator_epoch"] == before["coordinator_epoch"]
    assert all(
        pool["epoch"] > old["epoch"]
        for old, pool in zip(before["pools"], after["pools"], strict=True)
    )


def test_a_coordinator_and_a_rank_at_once(cluster: Cluster) -> None:
    """Nobody is there to miss the rank but the launcher."""
    pids, stream = cluster.pids(), begin(cluster)
    stream.wait_begun()
    send(pids[COORDINATOR], signal.SIGKILL)
    send(pids["decode0/1"], signal.SIGKILL)
    wait_gone(pids["decode0/0"])
    wait_whole(cluster)
    new = cluster.pids()
    changed = {name for name in pids if new[name] != pids[name]}
    assert changed == {COORDINATOR, "decode0/0", "decode0/1"}


# -- a coordinator that is busy, and one that is asked to end --------------------------------------


def test_a_busy_coordinator_and_the_end() -> None:
    """Its GIL is held for longer than ranks and launcher would wait for a dead one: nobody minds.
    A signal to every process of the cluster ends it when what runs has ended."""
    flags = (
        *("--prefill", "cp1", "--decode", "tp1", "--kv-memory", "8MiB", "--block-size", "16"),
        *("--checksum", "always", *QUICK),
        *("--set", "coordinator.failpoints=loop.reserve:hold=6@3"),
        *("--set", f"decode_pool.failpoints={SLOW_STEPS}"),
    )
    with run_cluster(MODEL, *flags) as cluster:
        before, pids = cluster.state(), cluster.pids()
        streams = [begin(cluster) for _ in range(2)]
        for stream in streams:
            stream.wait_begun()
        begin(cluster, 20).check_exact(MODEL)  # its Reserve is the third
        after = cluster.state()
        assert after["counters"]["failpoint:loop.reserve:hold"] == 1
        assert after["loop"]["lag_s"] > 5
        for stream in streams:
            stream.check_exact(MODEL)
        after = cluster.state()
        assert cluster.pids() == pids
        assert [pool["epoch"] for pool in after["pools"]] == [p["epoch"] for p in before["pools"]]
        assert "baton_attempts_lost_total{" not in cluster.http.get("/metrics").text
        streams = [begin(cluster) for _ in range(2)]
        for stream in streams:
            stream.wait_begun()
        for pid in (cluster.process.pid, *pids.values()):
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: cluster.http.get("/ready").status_code == 503, "it takes nothing new")
        reply = cluster.http.post("/v1/completions", json={"prompt": [1]})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shutting_down")
        for stream in streams:
            stream.check_exact(MODEL)
        assert cluster.process.wait(20) == 0
        assert not [pid for pid in pids.values() if Path(f"/proc/{pid}").exists()]


# -- without a launcher ----------------------------------------------------------------------------


def test_a_stale_coordinator(tmp_path: Path) -> None:
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
        "failpoints": SLOW_STEPS,
    }
    with contextlib.ExitStack() as stack:

        def start(module: str, name: str, settings: Json) -> LoneProcess:
            process = LoneProcess(tmp_path, module, name, settings)
            stack.callback(process.end)
            return process

        old = start("coordinator", "old", fields | {"epoch": 1})
        rank = start("decode", "rank", rank_fields)
        old_url = old.said("ready")
        running = Stream(old_url, [3] * 40, LONG)
        running.wait_begun()
        send(old.process.pid, signal.SIGSTOP)
        new = start("coordinator", "new", fields | {"epoch": 2, "is_restart": True})
        url = new.said("ready")
        prompt = [5] * 50
        stream = Stream(url, prompt, LONG)
        stream.wait_begun()
        os.kill(old.process.pid, signal.SIGCONT)
        assert old.process.wait(30) == 3
        stream.check_exact(MODEL)
        running.join(30)
        assert running.error
        assert not running.is_done
        assert rank.process.poll() is None

        def is_clean() -> bool:
            (state,) = httpx.get(f"{url}/v1/cluster").json()["pools"]
            (space,) = state["blocks"]
            return bool(space["free"] + space["cached"] == space["total"])

        wait_until(is_clean, "no block is held")


def test_restarts_are_used_up(tmp_path: Path) -> None:
    """The cluster goes on with what is left, and ends when nothing of it can answer."""
    flags = ("--prefill", "cp1", "--decode", "tp1", "--kv-memory", "8MiB", "--transport", "tcp")
    log = tmp_path / "errors"
    with run_cluster(MODEL, *flags, "--set", "restart_budget=0", log=log) as cluster:
        pids = cluster.pids()
        send(pids["prefill0/0"], signal.SIGKILL)
        wait_until(lambda: cluster.state()["missing"], "it is lost")
        assert cluster.http.get("/ready").status_code == 200
        check_exact(cluster)
        send(pids["decode0/0"], signal.SIGKILL)
        cluster.exit_code = 1
        assert cluster.process.wait(30) == 1
    errors = log.read_text()
    assert "prefill0 is given up after 0 restarts" in errors
    assert "error: decode0 is given up after 0 restarts" in errors
    assert "decode0/0 ended with code -9" in errors
    assert not [pid for pid in pids.values() if Path(f"/proc/{pid}").exists()]
