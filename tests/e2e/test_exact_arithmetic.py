"""The arithmetic model over every shape of cluster: one misplaced block is a wrong token.

Real processes, real NIXL, real HTTP. Prompts from one token to several chunks, cold, with prefix
hits and as turns of a session; block sizes drawn at random, the seed is in the test's name.
"""

import random
from typing import Any

import pytest

from modeling.arithmetic import expected_tokens
from modeling.checkpoint.config import load_config

MODEL = "arithmetic:layers=3,heads=8,kv_heads=4,vocab=512,max_len=8192"
SHAPES = {
    "tp1": ("--decode", "tp1"),
    "tp2": ("--decode", "tp2"),
    "cp1-tp1": ("--prefill", "cp1", "--decode", "tp1"),
    "cp2-tp1": ("--prefill", "cp2", "--decode", "tp1"),
    "cp2-tp2": ("--prefill", "cp2", "--decode", "tp2"),
    "cp4-tp2": ("--prefill", "cp4", "--decode", "tp2"),
    "cp2tp2-tp2": ("--prefill", "cp2tp2", "--decode", "tp2"),
}
NUM_TOKENS = 12


def _prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(500) for _ in range(length)]


@pytest.mark.cluster
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_exact(shape: str, start_cluster: Any, no_leaks: Any) -> None:
    rng = random.Random(shape)
    block_size = rng.choice([3, 8, 16, 24])
    config = load_config(MODEL)
    chunk = 256 // block_size * block_size
    flags = (
        *SHAPES[shape],
        *("--block-size", str(block_size), "--kv-memory", "48MiB", "--checksum", "always"),
        *("--set", f"prefill_pool.chunk_tokens={chunk}", "--set", "decode_pool.token_budget=128"),
        *("--set", "coordinator.local_prefill_threshold=0"),
    )
    with start_cluster(MODEL, *flags) as cluster:
        for length in (1, 2, block_size, block_size + 1, 200, 700, 1500):
            prompt = _prompt(rng, length)
            want = expected_tokens(config, prompt, NUM_TOKENS)
            assert cluster.tokens(prompt, NUM_TOKENS) == want, f"cold, {length} tokens"
            assert cluster.tokens(prompt, NUM_TOKENS) == want, f"cached, {length} tokens"
            longer = prompt + _prompt(rng, 40)
            want = expected_tokens(config, longer, NUM_TOKENS)
            assert cluster.tokens(longer, NUM_TOKENS) == want, f"prefix hit, {length} tokens"
        no_leaks(cluster)


@pytest.mark.cluster
@pytest.mark.parametrize("shape", ["cp1-tp1", "cp2-tp2", "cp2tp2-tp2"])
def test_a_session_computes_and_moves_only_what_is_new(
    shape: str, start_cluster: Any, no_leaks: Any
) -> None:
    rng = random.Random(7)
    config = load_config(MODEL)
    flags = (*SHAPES[shape], "--block-size", "16", "--kv-memory", "48MiB", "--checksum", "always")
    flags += ("--transport", "nixl", "--set", "coordinator.local_prefill_threshold=64")
    with start_cluster(MODEL, *flags) as cluster:
        # A long text and a question; then a history of short turns that only its home has seen.
        for session, turns in (("s1", (1200, 20, 300)), ("s2", (40, 40, 40, 40, 40, 300, 40, 300))):
            history: list[int] = []
            num_prefilled = 0  # that the prefill pool has computed or fetched, in whole blocks
            for num_new in turns:
                # KV of the last generated token was never computed, and a block has to be full.
                held = max(0, len(history) - 1) // 16 * 16
                history += _prompt(rng, num_new)
                answer = cluster.complete(history, NUM_TOKENS, session_id=session)
                tokens = answer["choices"][0]["token_ids"]
                assert tokens == expected_tokens(config, history, NUM_TOKENS)
                path = answer["path"]
                assert ("local" in path) == (num_new <= 40), "few new tokens are not worth moving"
                assert int(path["cached"]) == held
                assert int(path["computed"]) == len(history) - held
                assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == held
                if "local" not in path:
                    assert int(path.get("fetched", 0)) == held - num_prefilled
                    assert int(path["moved"]) == len(history) - held
                    num_prefilled = len(history) // 16 * 16
                history += tokens
        no_leaks(cluster)


@pytest.mark.cluster
def test_many_at_once_stay_apart(start_cluster: Any, no_leaks: Any) -> None:
    """Concurrent requests on a small pool: growth, pre-emption and queueing keep tokens exact."""
    from concurrent.futures import ThreadPoolExecutor

    rng = random.Random(11)
    config = load_config(MODEL)
    flags = ("--prefill", "cp2", "--prefill", "cp1", "--decode", "tp1", "--decode", "tp2")
    flags += ("--block-size", "8", "--kv-memory", "24MiB", "--checksum", "always")
    with start_cluster(MODEL, *flags) as cluster:
        prompts = [_prompt(rng, rng.choice([1, 30, 150, 400, 900])) for _ in range(24)]
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda prompt: cluster.tokens(prompt, 60), prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer == expected_tokens(config, prompt, 60), f"{len(prompt)} tokens"
        no_leaks(cluster)
