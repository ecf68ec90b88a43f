"""The same requests with ranks as Ray actors."""

import random
from typing import Any

import pytest

from modeling.arithmetic import expected_tokens
from modeling.config import load_config

MODEL = "arithmetic:layers=3,heads=4,kv_heads=2,vocab=512,max_len=4096"


@pytest.mark.cluster
def test_the_same_requests_pass_under_ray(start_cluster: Any, no_leaks: Any) -> None:
    rng = random.Random(5)
    config = load_config(MODEL)
    flags = ("--launcher", "ray", "--prefill", "cp2", "--decode", "tp2", "--kv-memory", "32MiB")
    with start_cluster(MODEL, *flags, "--block-size", "16") as cluster:
        for length in (1, 40, 700):
            prompt = [rng.randrange(500) for _ in range(length)]
            assert cluster.tokens(prompt, 8) == expected_tokens(config, prompt, 8)
            longer = prompt + [rng.randrange(500) for _ in range(200)]
            assert cluster.tokens(longer, 8) == expected_tokens(config, longer, 8)
        no_leaks(cluster)
