"""The arithmetic model over every shape of cluster: one misplaced block is a wrong token.

Real processes, real NIXL, real HTTP. Prompts from one token to several chunks, cold, with prefix
hits and as turns of a session; block sizes drawn at random, the seed is in the test's name.
"""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.cluster import expected, parse_path, prompt_of, run_cluster

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


@pytest.mark.cluster
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_exact(shape: str) -> None:
    rng = random.Random(shape)
    block_size = rng.choice([3, 8, 16, 24])
    chunk = 256 // block_size * block_size
    flags = (
        *SHAPES[shape],
        *("--block-size", str(block_size), "--kv-memory", "48MiB", "--checksum", "always"),
        *("--set", f"prefill_pool.chunk_tokens={chunk}", "--set", "decode_pool.token_budget=128"),
        *("--set", "coordinator.local_prefill_threshold=0"),
    )
    with run_cluster(MODEL, *flags) as cluster:
        for length in (1, 2, block_size, block_size + 1, 200, 700, 1500):
            prompt = prompt_of(rng, length)
            want = expected(MODEL, prompt, NUM_TOKENS)
            assert cluster.tokens(prompt, NUM_TOKENS) == want, f"cold, {length} tokens"
            assert cluster.tokens(prompt, NUM_TOKENS) == want, f"cached, {length} tokens"
            longer = prompt + prompt_of(rng, 40)
            want = expected(MODEL, longer, NUM_TOKENS)
            assert cluster.tokens(longer, NUM_TOKENS) == want, f"prefix hit, {length} tokens"
        cluster.assert_no_leaks()


@pytest.mark.cluster
@pytest.mark.parametrize("shape", ["cp1-tp1", "cp2-tp2", "cp2tp2-tp2"])
def test_a_session_computes_and_moves_only_what_is_new(shape: str) -> None:
    rng = random.Random(7)
    flags = (
        *SHAPES[shape],
        *("--block-size", "16", "--kv-memory", "48MiB", "--checksum", "always"),
        *("--transport", "nixl", "--set", "coordinator.local_prefill_threshold=64"),
    )
    with run_cluster(MODEL, *flags) as cluster:
        # A long text and a question; then a history of short turns that only its home has seen.
        for session, turns in (("s1", (1200, 20, 300)), ("s2", (40, 40, 40, 40, 40, 300, 40, 300))):
            history: list[int] = []
            num_prefilled = 0  # that the prefill pool has computed or fetched, in whole blocks
            for num_new in turns:
                # KV of the last generated token was never computed, and a block has to be full.
                held = max(0, len(history) - 1) // 16 * 16
                history += prompt_of(rng, num_new)
                answer = cluster.complete(history, NUM_TOKENS, session_id=session)
                tokens = answer.token_ids
                assert tokens == expected(MODEL, history, NUM_TOKENS)
                path = parse_path(answer.path)
                assert ("local" in path) == (num_new <= 40), "few new tokens are not worth moving"
                assert int(path["cached"]) == held
                assert int(path["computed"]) == len(history) - held
                assert answer.usage is not None and answer.usage.cached_tokens == held
                if "local" not in path:
                    assert int(path.get("fetched", 0)) == held - num_prefilled
                    assert int(path["moved"]) == len(history) - held
                    num_prefilled = len(history) // 16 * 16
                history += tokens
        cluster.assert_no_leaks()


@pytest.mark.cluster
def test_many_at_once_stay_apart() -> None:
    """Concurrent requests on a small pool: growth, pre-emption and queueing keep tokens exact."""
    rng = random.Random(11)
    flags = (
        *("--prefill", "cp2", "--prefill", "cp1", "--decode", "tp1", "--decode", "tp2"),
        *("--block-size", "8", "--kv-memory", "24MiB", "--checksum", "always"),
    )
    with run_cluster(MODEL, *flags) as cluster:
        prompts = [prompt_of(rng, rng.choice([1, 30, 150, 400, 900])) for _ in range(24)]
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda prompt: cluster.tokens(prompt, 60), prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer == expected(MODEL, prompt, 60), f"{len(prompt)} tokens"
        cluster.assert_no_leaks()
