"""A cluster's state beside a run: what it says is kept, and a server that says nothing is left in
peace."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bench.load.driving.driver import Target
from bench.load.driving.target import discover, num_accelerators
from bench.load.driving.watch import MAX_MISSED, Watch
from bench.load.record import read_run, write_run
from bench.load.run import Plan, execute
from bench.load.samples import (
    SAMPLES_FILE,
    Blocks,
    ClusterSample,
    PoolSample,
    read_samples,
    sample_of,
    shifted_sample,
)
from bench.load.workload.arrival import Poisson
from bench.load.workload.prompts import Dialect
from bench.load.workload.schedule import draw
from bench.load.workload.sessions import Lengths
from protocol.errors import ConfigError
from tests.bench.example import sample_run
from tests.bench.toy_server import ToyConfig

START = Callable[..., str]
DEADLINE_S = 20.0
QUICK = ToyConfig(base_s=0.005, prefill_s_per_1k=0.0, token_s=0.001)


def _state(num_steps: int = 0) -> dict[str, Any]:
    """As ``/v1/cluster`` has it, with more than a sample keeps."""
    blocks = {"total": 10, "free": 4, "owned": 2, "in_flight": 1, "cached": 3}
    shared = {"epoch": 1, "serving": True, "pending_tokens": 7, "tokens_per_s": 5.0}
    counters = {"prefill_computed_tokens": 10.0 * num_steps}
    ranks = [{"rank": 0, "counters": counters}, {"rank": 1, "counters": {}}]
    return {
        "object": "cluster",
        "num_active_requests": 3,
        "pools": [
            {**shared, "pool_id": "prefill0", "role": "prefill", "num_running": 1}
            | {"num_waiting": 2, "blocks": [blocks], "ranks": ranks},
            {**shared, "pool_id": "decode0", "role": "decode", "blocks": [], "ranks": ranks[:1]},
            {**shared, "pool_id": "store0", "role": "store", "blocks": [], "ranks": ranks[:1]},
        ],
    }


@dataclass
class _Cluster:
    """Answers ``/v1/cluster`` with the state, or with whatever status it is told."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    """Of the next answers; 200 when it is empty."""
    num_asked: int = 0
    keys: set[str | None] = field(default_factory=set)


@pytest.fixture
def cluster() -> Iterator[_Cluster]:
    """A server of its own, in threads."""
    found = _Cluster()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            found.num_asked += 1
            found.keys.add(self.headers["authorization"])
            status = found.statuses.pop(0) if found.statuses else 200
            body = json.dumps(_state(found.num_asked)).encode() if status == 200 else b"no"
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def _target(url: str) -> Target:
    return Target("it", url, Dialect("m"), "secret")


def _watch(url: str, num: int) -> tuple[list[ClusterSample], dict[str, Any] | None]:
    """``num`` samples and the one at the end, and what the manifest would say."""
    found: list[ClusterSample] = []

    async def main() -> dict[str, Any] | None:
        enough = asyncio.Event()

        def keep(sample: ClusterSample) -> None:
            found.append(sample)
            if len(found) == num:
                enough.set()

        async with Watch(_target(url), keep, interval_s=0.01) as watch:
            task = asyncio.create_task(watch.follow(asyncio.get_running_loop().time()))
            if num:
                await asyncio.wait_for(enough.wait(), DEADLINE_S)
                task.cancel()
            else:
                await asyncio.wait_for(task, DEADLINE_S)
            await watch.end()
            return watch.described()

    return found, asyncio.run(main())


def test_states_are_taken_one_after_the_other(cluster: _Cluster) -> None:
    found, described = _watch(cluster.url, 4)
    assert len(found) >= 5
    times = [sample.at_s for sample in found]
    assert times == sorted(times)
    assert times[0] >= 0.0
    computed = [sample.pools[0].counters["prefill_computed_tokens"] for sample in found]
    assert computed == sorted(set(computed))
    first = found[0]
    assert (first.target, first.num_active_requests) == ("it", 3)
    assert [(p.pool_id, p.num_running, p.num_waiting) for p in first.pools[:2]] == [
        ("prefill0", 1, 2),
        ("decode0", 0, 0),
    ]
    assert first.pools[0].blocks[0].held == 3
    assert described is not None
    assert described["num_samples"] == len(found)
    assert (described["file"], described["num_missed"]) == (SAMPLES_FILE, 0)
    assert cluster.keys == {"Bearer secret"}


def test_seconds_without_an_answer_are_counted_and_not_made_up(cluster: _Cluster) -> None:
    cluster.statuses = [200, 200, 503, 503]  # the first is from before the run
    found, described = _watch(cluster.url, 3)
    assert described is not None
    assert described["num_missed"] == 2
    assert described["num_samples"] == len(found)


def test_whoever_is_gone_is_left_alone_after_a_while(cluster: _Cluster) -> None:
    cluster.statuses = [200, *[500] * (MAX_MISSED + 1)]
    found, described = _watch(cluster.url, 0)
    assert found == []
    assert described is not None
    assert described["num_missed"] == MAX_MISSED + 1  # the last one at the run's end


@pytest.mark.parametrize("status", [404, 401, 200])
def test_a_foreign_server_is_asked_once(status: int, cluster: _Cluster) -> None:
    path = "" if status != 200 else "/elsewhere"
    cluster.statuses = [status] if status != 200 else [404]
    found, described = _watch(cluster.url + path, 0)
    assert (found, described, cluster.num_asked) == ([], None, 1)


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b'{"pools": []}', b'{"pools": [{}]}', b"x"])
def test_what_is_not_a_cluster_is_no_sample(answer: bytes) -> None:
    assert sample_of(answer, "it", 0.0, 0.0) is None


def test_a_run_of_a_foreign_server_has_no_samples(toy: START) -> None:
    target = discover(toy(QUICK), Dialect(""))
    schedule = draw(Lengths("9", "3"), Poisson(20.0), 0, duration_s=0.5)
    found: list[ClusterSample] = []
    manifest, records = execute(Plan(target, schedule, {}, {}), None, found.append)
    assert records
    assert found == []
    assert "samples" not in manifest.driver


def test_a_store_is_no_accelerator(cluster: _Cluster) -> None:
    assert num_accelerators(_target(cluster.url)) == 3


SAMPLES = [
    ClusterSample("a", 0.0, 0.01, 0, (PoolSample("decode0", "decode"),)),
    ClusterSample(
        *("a", 1.0, 0.01, 2),
        (PoolSample("decode0", "decode", False, 1, 2, 3, (Blocks(9, 1, 2),), {"x": 1.0}),),
    ),
]


def test_samples_survive_the_disk_and_do_not_outlive_their_run(tmp_path: Path) -> None:
    run = sample_run(0, 2.0, 2.0)
    write_run(tmp_path, *run, SAMPLES)
    assert read_samples(tmp_path) == SAMPLES
    assert [sample.at_s for sample in (shifted_sample(s, 10.0) for s in SAMPLES)] == [10.0, 11.0]
    write_run(tmp_path, *run)
    assert read_samples(tmp_path) == []
    assert read_run(tmp_path)[1]


def test_a_damaged_sample_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, *sample_run(0, 2.0, 2.0), SAMPLES)
    path = tmp_path / SAMPLES_FILE
    path.write_bytes(path.read_bytes() + b'{"target": "a"}\n')
    with pytest.raises(ConfigError, match=r"cluster\.jsonl:3: .*at_s"):
        read_samples(tmp_path)
