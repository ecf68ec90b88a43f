"""Pools are killed while they work: the caller's stream goes on, token for token.

Real processes, real NIXL, real HTTP, and the arithmetic model: its tokens are the only right
answer, and a block that was kept too early, or lost, gives another one. A pool's ranks are all
killed, and in all tests but the last they are not started again.
"""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.cluster import SLOW_STEPS, Cluster, prompt_of, run_cluster, wait_until
from tests.modeling.checkpoints import write_checkpoint

MODEL = "arithmetic:layers=3,heads=4,kv_heads=2,vocab=512,max_len=16384"
FLAGS = (
    *("--block-size", "16", "--kv-memory", "64MiB", "--checksum", "always"),
    *("--transport", "nixl"),
)
SLOW = ("--set", f"decode_pool.failpoints={SLOW_STEPS}")
NUMBERS = {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 60, "maxItems": 60}
QUICK = (
    *("--set", "coordinator.heartbeat_timeout_s=2.5", "--set", "restart_budget=0"),
    *("--set", "coordinator.local_prefill_threshold=32"),
    *SLOW,
)


@contextmanager
def unrepaired(*flags: str, model: str = MODEL) -> Iterator[Cluster]:
    """A cluster of which nobody restarts what dies."""
    with run_cluster(model, *flags, *FLAGS, *QUICK) as cluster:
        yield cluster


def wait_for_output(cluster: Cluster, name: str, count: int) -> None:
    """Until a request has more tokens than that."""
    wait_until(
        lambda: cluster.timeline(name).get("num_output_tokens", 0) > count, f"{name} is under way"
    )


@pytest.mark.cluster
def test_streams_survive_the_death_of_a_decode_pool() -> None:
    rng = random.Random(3)
    prompts = {f"s{n}": prompt_of(rng, length) for n, length in enumerate((5, 400, 900, 40))}
    with unrepaired("--prefill", "cp2", "--decode", "tp2", "--decode", "tp1") as cluster:
        streams = {
            name: cluster.stream(prompt, 200, name, logprobs=0) for name, prompt in prompts.items()
        }
        held_to = {"structured_outputs": {"json": NUMBERS}, "ignore_eos": False}
        sampled = {"temperature": 1.0, "seed": 5}
        held = cluster.stream(prompts["s3"], 2000, "held", **held_to, **sampled)
        homes = {}
        for name in (*streams, "held"):
            wait_for_output(cluster, name, 20)
            homes[name] = cluster.timeline(name)["decode_pool"]
        victim = homes["held"]
        cluster.kill_pool(victim)
        held.wait_ended()
        assert held.finish_reason == "stop"
        numbers = json.loads(bytes(held.token_ids[:-1]))  # the model's tokens are bytes
        assert len(numbers) == 60 and set(numbers) == {1, 2, 3}
        assert cluster.timeline("held")["attempt"] == 2, "it was not killed in mid-answer"
        for name, stream in streams.items():
            stream.check_exact(MODEL)
            assert stream.finish_reason == "length"
            assert stream.num_logprobs == 200
            assert stream.usage is not None
            assert stream.usage.prompt_tokens == len(stream.prompt)
            assert stream.usage.completion_tokens == 200
            timeline = cluster.timeline(name)
            assert timeline["attempt"] == (2 if homes[name] == victim else 1)
            if homes[name] == victim:
                [lost] = timeline["lost_attempts"]
                assert (lost["reason"], lost["decode_pool"]) == ("worker_lost", victim)
                assert 20 < lost["num_output_tokens"] < 200, "it was not killed in mid-stream"
                assert timeline["decode_pool"] != victim
        cluster.assert_no_leaks(num_lost=1)


@pytest.mark.cluster
def test_a_prompt_goes_on_where_its_dead_prefill_pool_was() -> None:
    """A ring of two dies in the middle of a prompt; a ring of one goes on from what was handed
    over, which it fetches back from the decode pool."""
    prompt = prompt_of(random.Random(4), 9000)
    flags = ("--prefill", "cp2", "--prefill", "cp1", "--decode", "tp2")
    with unrepaired(*flags, "--set", "prefill_pool.chunk_tokens=256") as cluster:
        stream = cluster.stream(prompt, 40, "long")
        wait_until(
            lambda: cluster.timeline("long").get("num_prefilled_tokens", 0) >= 5000,
            "a part of the prompt is computed",  # what is read of it may be seconds behind
        )
        victim = cluster.timeline("long")["prefill_pool"]
        cluster.kill_pool(victim)
        stream.check_exact(MODEL)
        timeline = cluster.timeline("long")
        assert [lost["prefill_pool"] for lost in timeline["lost_attempts"]] == [victim]
        assert timeline["lost_attempts"][0]["num_output_tokens"] == 0, "it was killed too late"
        assert timeline["prefill_pool"] not in (victim, None)
        path = timeline["prefill"]
        assert path["num_fetched_tokens"] >= 1000, "what was handed over was computed again"
        assert path["num_fetched_tokens"] + path["num_computed_tokens"] == len(prompt)
        cluster.assert_no_leaks(num_lost=1)


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
    flags = ("--prefill", "cp1", "--decode", "tp1", "--decode", "tp1", "--dtype", "float32")
    with unrepaired(*flags, model=str(tmp_path)) as cluster:
        undisturbed = cluster.stream(prompt, 150, "first", **sampling)
        undisturbed.wait_ended()
        assert len(set(undisturbed.token_ids)) > 20
        stream = cluster.stream(prompt, 150, "second", **sampling)
        wait_for_output(cluster, "second", 30)
        cluster.kill_pool(cluster.timeline("second")["decode_pool"])
        stream.wait_ended()
        [lost] = cluster.timeline("second")["lost_attempts"]
        assert 30 < lost["num_output_tokens"] < 150
        assert stream.token_ids == undisturbed.token_ids
        assert stream.finish_reason == "length"


@pytest.mark.cluster
def test_a_stream_waits_for_its_only_pool_to_come_back() -> None:
    """The one decode pool is started again, and the stream goes on there."""
    prompt = prompt_of(random.Random(6), 500)
    with run_cluster(MODEL, "--prefill", "cp1", "--decode", "tp1", *FLAGS, *SLOW) as cluster:
        stream = cluster.stream(prompt, 150, "only")
        wait_for_output(cluster, "only", 20)
        cluster.kill_pool("decode0")
        stream.check_exact(MODEL)
        timeline = cluster.timeline("only")
        assert [lost["reason"] for lost in timeline["lost_attempts"]] == ["worker_lost"]
        assert timeline["decode_pool"] == "decode0"
        assert timeline["prefill"]["num_cached_tokens"] >= 480, "the prompt's KV was not taken"
        cluster.assert_no_leaks()
