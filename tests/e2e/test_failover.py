"""Pools are killed while they work: the caller's stream goes on, token for token.

Real processes, real NIXL, real HTTP, and the arithmetic model: ``expected_tokens`` is the only
right answer, and a block that was kept too early, or lost, gives another one. A pool's ranks are
all killed, and in all tests but the last nobody starts them again.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from launcher.config import ServeConfig
from modeling.arithmetic import expected_tokens
from modeling.checkpoint.config import load_config
from tests.modeling.checkpoints import write_checkpoint

MODEL = "arithmetic:layers=3,heads=4,kv_heads=2,vocab=512,max_len=16384"
DEADLINE_S = 90.0


class Cluster:
    """A running cluster whose ranks may be killed."""

    def __init__(self, url: str, pids: dict[str, int]) -> None:
        self.client = httpx.Client(base_url=url, timeout=DEADLINE_S)
        self._pids = pids  # by name, "decode0/1"
        self._threads = ThreadPoolExecutor(8)

    def close(self) -> None:
        self._threads.shutdown()
        self.client.close()

    def kill_pool(self, pool_id: str) -> None:
        """Every rank of it, at once and for good."""
        pids = [pid for name, pid in self._pids.items() if name.startswith(f"{pool_id}/")]
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def trace(self, name: str) -> dict[str, Any]:
        """What became of a request so far."""
        reply = self.client.get(f"/v1/requests/{name}/timeline")
        if reply.status_code == 404:
            return {}
        requests: list[dict[str, Any]] = reply.json()["requests"]
        return requests[0] if requests else {}

    def stream(
        self, name: str, prompt: list[int], max_tokens: int, **fields: Any
    ) -> "Future[Stream]":
        """Ask, in another thread; greedily unless ``fields`` say otherwise."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "temperature": 0}
        body |= {"return_token_ids": True, "ignore_eos": True, "logprobs": 0}
        body["stream_options"] = {"include_usage": True}
        return self._threads.submit(self._stream, name, body | fields)

    def _stream(self, name: str, body: dict[str, Any]) -> "Stream":
        stream = Stream()
        with self.client.stream(
            "POST", "/v1/completions", json=body, headers={"x-request-id": name}
        ) as reply:
            for line in reply.iter_lines():
                stream.take(line)
        return stream


class Stream:
    """What came of one stream."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.num_logprobs = 0
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] = {}
        self.error: dict[str, Any] = {}
        self.is_done = False

    def take(self, line: str) -> None:
        if line == "data: [DONE]":
            self.is_done = True
        elif line.startswith("data: "):
            chunk = json.loads(line.removeprefix("data: "))
            self.error = chunk.get("error") or self.error
            self.usage = chunk.get("usage") or self.usage
            for choice in chunk.get("choices", ()):
                self.tokens += choice["token_ids"]
                self.num_logprobs += len((choice["logprobs"] or {}).get("token_logprobs", ()))
                self.finish_reason = choice["finish_reason"] or self.finish_reason


@contextmanager
def running(
    prefill: tuple[str, ...], decode: tuple[str, ...], model: str = MODEL, **pools: Any
) -> Iterator[Cluster]:
    config = ServeConfig(
        model=model,
        prefill=prefill,
        decode=decode,
        port=0,
        block_size=16,
        kv_memory="64MiB",
        checksum="always",
        transport="nixl",
        log_level="WARNING",
        coordinator={"heartbeat_timeout_s": 2.5, "local_prefill_threshold": 32},
        **pools,
    )
    script = Path(__file__).parent / "unsupervised.py"
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(script.parent.parent.parent)},
    )
    assert process.stdin is not None and process.stdout is not None
    with process.stdin, process.stdout:
        process.stdin.write(msgspec.json.encode(config).decode() + "\n")
        process.stdin.flush()
        cluster = Cluster(**json.loads(process.stdout.readline()))
        try:
            yield cluster
        finally:
            cluster.close()
    assert process.wait(DEADLINE_S) == 0


def until(condition: Any, what: str) -> Any:
    """Wait for the answer of another process; there is no event to wait for."""
    pause = threading.Event()
    for _ in range(int(DEADLINE_S / 0.02)):
        value = condition()
        if value:
            return value
        pause.wait(0.02)
    raise AssertionError(f"never: {what}")


def prompt_of(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(500) for _ in range(num_tokens)]


def assert_clean(cluster: Cluster) -> None:
    """No living pool holds a block of anything."""

    def is_clean() -> bool:
        state = cluster.client.get("/v1/cluster").json()
        spaces = [s for pool in state["pools"] if pool["serving"] for s in pool["blocks"]]
        return bool(spaces) and all(s["free"] + s["cached"] == s["total"] for s in spaces)

    until(is_clean, "blocks are still held")


@pytest.mark.cluster
def test_streams_survive_the_death_of_a_decode_pool() -> None:
    rng, config = random.Random(3), load_config(MODEL)
    prompts = [prompt_of(rng, length) for length in (5, 400, 900, 40)]
    with running(("cp2",), ("tp2", "tp1")) as cluster:
        streams = [cluster.stream(f"s{i}", prompt, 700) for i, prompt in enumerate(prompts)]
        homes = [
            until(
                lambda i=i: (
                    cluster.trace(f"s{i}").get("num_output_tokens", 0) > 20
                    and cluster.trace(f"s{i}")["decode_pool"]
                ),
                f"stream {i} is under way",
            )
            for i in range(len(prompts))
        ]
        victim = homes[-1]
        cluster.kill_pool(victim)
        for i, (future, prompt) in enumerate(zip(streams, prompts, strict=True)):
            stream = future.result(DEADLINE_S)
            assert not stream.error
            assert stream.tokens == expected_tokens(config, prompt, 700), f"stream {i}"
            assert stream.is_done and stream.finish_reason == "length"
            assert stream.num_logprobs == 700
            assert stream.usage["prompt_tokens"] == len(prompt)
            assert stream.usage["completion_tokens"] == 700
            trace = cluster.trace(f"s{i}")
            assert trace["attempt"] == (2 if homes[i] == victim else 1)
            if homes[i] == victim:
                [lost] = trace["lost_attempts"]
                assert (lost["reason"], lost["decode_pool"]) == ("worker_lost", victim)
                assert 20 < lost["num_output_tokens"] < 700, "it was not killed in mid-stream"
                assert trace["decode_pool"] != victim
        assert_clean(cluster)


@pytest.mark.cluster
def test_a_prompt_goes_on_where_its_dead_prefill_pool_was() -> None:
    """A ring of two dies in the middle of a prompt; a ring of one goes on from what was handed
    over, which it fetches back from the decode pool."""
    rng, config = random.Random(4), load_config(MODEL)
    prompt = prompt_of(rng, 9000)
    chunks = {"prefill_pool": {"chunk_tokens": 256}}
    with running(("cp2", "cp1"), ("tp2",), **chunks) as cluster:
        future = cluster.stream("long", prompt, 40)
        until(
            lambda: cluster.trace("long").get("num_prefilled_tokens", 0) >= 5000,
            "a part of the prompt is computed",  # what is read of it may be seconds behind
        )
        victim = cluster.trace("long")["prefill_pool"]
        cluster.kill_pool(victim)
        stream = future.result(DEADLINE_S)
        trace = cluster.trace("long")
        assert not stream.error
        assert stream.tokens == expected_tokens(config, prompt, 40)
        assert [lost["prefill_pool"] for lost in trace["lost_attempts"]] == [victim]
        assert trace["lost_attempts"][0]["num_output_tokens"] == 0, "it was killed too late"
        assert trace["prefill_pool"] not in (victim, None)
        path = trace["prefill"]
        assert path["num_fetched_tokens"] >= 1000, "what was handed over was computed again"
        assert path["num_fetched_tokens"] + path["num_computed_tokens"] == len(prompt)
        assert_clean(cluster)


@pytest.mark.cluster
def test_a_sampled_stream_goes_on_with_the_same_random_numbers(tmp_path: Path) -> None:
    """With a temperature, penalties and a real checkpoint: equal to the stream of no fault."""
    write_checkpoint(
        tmp_path, family="llama", hidden=64, layers=3, heads=8, kv_heads=4, ffn=96, vocab=320,
        dtype="float32", seed=3,
    )  # fmt: skip
    rng = random.Random(5)
    prompt = [rng.randrange(5, 300) for _ in range(200)]
    sampling = {"temperature": 0.9, "top_p": 0.9, "presence_penalty": 0.7, "frequency_penalty": 0.2}
    sampling |= {"repetition_penalty": 1.1, "seed": 11}
    with running(("cp1",), ("tp1", "tp1"), str(tmp_path), dtype="float32") as cluster:
        undisturbed = cluster.stream("first", prompt, 500, **sampling).result(DEADLINE_S)
        assert len(set(undisturbed.tokens)) > 20
        future = cluster.stream("second", prompt, 500, **sampling)
        until(lambda: cluster.trace("second").get("num_output_tokens", 0) > 30, "it is under way")
        cluster.kill_pool(cluster.trace("second")["decode_pool"])
        stream = future.result(DEADLINE_S)
        [lost] = cluster.trace("second")["lost_attempts"]
        assert 30 < lost["num_output_tokens"] < 500
        assert stream.tokens == undisturbed.tokens
        assert stream.finish_reason == "length"


def pids_of_ranks(launcher_pid: int) -> dict[str, int]:
    """The launcher's children by the names of their configuration files."""
    children = Path(f"/proc/{launcher_pid}/task/{launcher_pid}/children").read_text().split()
    pids = {}
    for child in children:
        words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
        if "--config" in words:
            config = Path(words[words.index("--config") + 1])
            pids[config.stem.replace(".", "/")] = int(child)
    return pids


@pytest.mark.cluster
def test_a_stream_waits_for_its_only_pool_to_come_back(start_cluster: Any) -> None:
    """With its launcher: the one decode pool is started again, and the stream goes on there."""
    config, prompt = load_config(MODEL), prompt_of(random.Random(6), 500)
    flags = ("--prefill", "cp1", "--decode", "tp1", "--block-size", "16", "--kv-memory", "64MiB")
    with start_cluster(MODEL, *flags, "--checksum", "always") as running_cluster:
        pids = pids_of_ranks(running_cluster.process.pid)
        cluster = Cluster(running_cluster.url, pids)
        future = cluster.stream("only", prompt, 600)
        until(lambda: cluster.trace("only").get("num_output_tokens", 0) > 20, "it is under way")
        cluster.kill_pool("decode0")
        stream = future.result(DEADLINE_S)
        assert not stream.error
        assert stream.tokens == expected_tokens(config, prompt, 600)
        trace = cluster.trace("only")
        assert [lost["reason"] for lost in trace["lost_attempts"]] == ["worker_lost"]
        assert trace["decode_pool"] == "decode0"
        assert trace["prefill"]["num_cached_tokens"] >= 480, "the prompt's KV was not taken"
        assert_clean(cluster)
        cluster.close()
