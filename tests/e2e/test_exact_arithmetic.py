"""The arithmetic model over every shape of cluster: one misplaced block is a wrong token.

Real processes, real NIXL, real HTTP. Prompts from one token to several chunks, cold, with prefix
hits and as turns of a session; block sizes drawn at random, the seed is in the test's name.
"""

import random
from typing import Any

import pytest

from modeling.arithmetic import expected_tokens
from modeling.config import load_config

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


SESSION_BLOCK = 16


@pytest.mark.cluster
def test_a_session_computes_and_moves_only_what_is_new(start_cluster: Any, no_leaks: Any) -> None:
    """What the session's home holds is never moved again, nor computed again there.

    Only a new part that is long is sent to the prefill pool all the same, which computes again what
    it has not seen: answers, and the turns that the home computed.
    """
    rng = random.Random(7)
    config = load_config(MODEL)
    slack = 2 * SESSION_BLOCK  # partial blocks are not shared
    flags = ("--prefill", "cp2", "--decode", "tp2", "--block-size", str(SESSION_BLOCK))
    flags += ("--kv-memory", "48MiB", "--set", "coordinator.local_prefill_threshold=64")
    flags += ("--set", "coordinator.home_prefill_threshold=400")
    with start_cluster(MODEL, *flags) as cluster:
        history = _prompt(rng, 900)
        unseen = 0  # tokens that only the home has computed
        for turn, (num_new, num_answer, is_local) in enumerate(
            (
                (300, 4, False),
                (300, 40, False),  # the prefill pool has seen every full block before
                (20, 200, True),  # too short to be worth a journey
                (300, 12, True),  # the prefill pool would compute the last turns again
                (900, 12, False),  # long enough to be worth that
            )
        ):
            history += _prompt(rng, num_new)
            answer = cluster.complete(history, num_answer, session_id="s1")
            tokens = answer["choices"][0]["token_ids"]
            assert tokens == expected_tokens(config, history, num_answer)
            path = answer["path"]
            assert ("local" in path) is is_local, path
            if turn > 0:
                again = unseen if turn == 4 else 0
                assert int(path["computed"]) <= num_new + again + slack
                assert is_local or int(path["moved"]) <= num_new + slack
            unseen = unseen + num_new + num_answer if is_local else num_answer
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
