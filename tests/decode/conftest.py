"""A scheduler in surroundings that live in memory, see fake_cluster.py and real_ranks.py."""

from collections.abc import Callable
from typing import Any

import pytest

from decode.facts import DecodeFacts
from kvcache.blocks import BlockPool
from tests.decode.fake_cluster import Cluster, FakeRank, reference
from tests.decode.real_ranks import Ranks


@pytest.fixture(scope="session")
def make_cluster() -> Callable[..., Cluster]:
    def make(
        num_blocks: int = 16,
        block_size: int = 4,
        max_model_len: int = 1000,
        token_budget: int = 16,
        max_num_sequences: int = 8,
        rank: Any = None,
        expected: Any = reference,
        **limits: int,
    ) -> Cluster:
        return Cluster(
            BlockPool(num_blocks, block_size),
            DecodeFacts(
                model_fingerprint="fingerprint",
                max_model_len=max_model_len,
                token_budget=token_budget,
                max_num_sequences=max_num_sequences,
                **limits,
            ),
            rank or FakeRank(block_size),
            expected,
        )

    return make


@pytest.fixture(scope="session")
def make_ranks() -> type[Ranks]:
    return Ranks
