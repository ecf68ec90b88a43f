"""A decode pool whose memory is damaged, in real processes: callers notice nothing, it is lost."""

import random
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.e2e.cluster import parse_path, run_cluster, wait_until
from tests.modeling.checkpoints import write_checkpoint

NUM_TOKENS = 6
DAMAGED, SOUND = "decode0", "decode1"  # of idle pools the first one is asked
BACK_S = 60.0
NAN = struct.pack("<f", float("nan"))
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw.p ")


def damage(pid: int, wanted: bytes) -> int:
    """Write NaN over ``wanted`` wherever a process has it in its memory; how often that was."""
    num_found = 0
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        for first, end in _MAPPING.findall(Path(f"/proc/{pid}/maps").read_text()):
            start, size = int(first, 16), int(end, 16) - int(first, 16)
            memory.seek(start)
            try:
                held = memory.read(size)
            except OSError:  # not to be read by anybody, as the kernel's own
                continue
            for found in re.finditer(re.escape(wanted), held):
                memory.seek(start + found.start())
                memory.write(NAN * (len(wanted) // len(NAN)))
                num_found += 1
    return num_found


@pytest.mark.cluster
def test_a_pool_that_makes_numbers_that_are_not_finite_is_lost(tmp_path: Path) -> None:
    """Three different requests prove it guilty, each of which the other pool answers; its next
    ranks have read their weights anew."""
    write_checkpoint(
        tmp_path, family="llama", hidden=64, layers=2, heads=4, kv_heads=2, ffn=96, vocab=320,
        dtype="float32", seed=3,
    )  # fmt: skip
    weights = load_file(tmp_path / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"].numpy().tobytes()
    rng = random.Random(8)
    prompts = [[rng.randrange(5, 300) for _ in range(40)] for _ in range(12)]
    flags = ("--decode", "tp1", "--decode", "tp1", "--dtype", "float32", "--kv-memory", "8MiB")
    with run_cluster(str(tmp_path), *flags, "--block-size", "16") as cluster:

        def damaged() -> dict[str, Any]:
            return cluster.pools()[DAMAGED]

        def ask(number: int) -> tuple[list[int], str]:
            """The answer to a prompt that no cache has, and the pool that it is of."""
            prompt = prompts[number % len(prompts)]
            answer = cluster.complete(prompt, NUM_TOKENS, cache_salt=f"{number}")
            return answer.token_ids, parse_path(answer.path)["decode"]

        first = [ask(number) for number in range(len(prompts))]
        assert {pool_id for _, pool_id in first} == {DAMAGED}
        epoch, number = damaged()["epoch"], len(prompts)
        assert damage(cluster.pids()[f"{DAMAGED}/0"], embedding)
        while damaged()["serving"] and damaged()["epoch"] == epoch:
            answer = ask(number)
            assert answer == (first[number % len(prompts)][0], SOUND)
            number += 1
            assert number < 200, "it is asked, and found out"
        assert "not finite for 3 different requests" in damaged()["lost_reason"]
        wait_until(
            lambda: damaged()["serving"] and damaged()["epoch"] > epoch, "it is back", BACK_S
        )
        again = [ask(number) for number in range(200, 200 + len(prompts))]
        assert [tokens for tokens, _ in again] == [
            first[number % len(prompts)][0] for number in range(200, 200 + len(prompts))
        ]
        assert DAMAGED in {pool_id for _, pool_id in again}
        text = cluster.http.get("/metrics").text
        counts = re.findall(r'baton_non_finite_logits_total\{pool="(\w+)"\} (\S+)', text)
        assert [pool_id for pool_id, _ in counts] == [DAMAGED]
        assert 3 <= float(counts[0][1]) <= number - len(prompts)
        cluster.assert_no_leaks()
