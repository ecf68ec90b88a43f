"""Scheduler and runners together, on the arithmetic model: the first token is exactly right.

Each cp rank is a thread with a pool of its own; rings go through memory. One swapped, missing or
stale block would give another token.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
import torch

from kvcache.pool import KVPool
from kvtransfer.events import AnnounceBlocks, AnnouncedAll, Command
from modeling.arithmetic import ArithmeticModel
from modeling.checkpoint.config import load_config
from modeling.parallel import SingleRank
from prefill.announcer import Announcer
from prefill.runner import PrefillRunner
from protocol.handoff import SegmentKey
from protocol.kv import KVLayout
from protocol.messages import FirstToken, Prefill
from protocol.plans import PrefillPlan
from tests.arithmetic_reference import expected_tokens
from tests.ring_attention.local_ring import LocalRing

MODEL = load_config("arithmetic:layers=6,heads=2,kv_heads=1,vocab=1000,max_len=4096")
BUDGET_S = 60.0
NUM_TOKENS = (3, 150, 301, 64, 1, 500, 97, 64)


class Ranks:
    """The ranks of a pool, each a thread while a plan is executed."""

    def __init__(self, pool: Any) -> None:
        facts = pool.scheduler.facts
        geometry = facts.geometry
        self.pool = pool
        self.ring = LocalRing(timeout_s=BUDGET_S)
        self.announced: list[tuple[int, Command]] = []
        self.runners = [self._runner(rank, facts) for rank in range(geometry.cp_size)]

    def _runner(self, rank: int, facts: Any) -> PrefillRunner:
        layout = KVLayout(
            num_layers=MODEL.num_layers,
            num_blocks=facts.num_blocks,
            num_kv_heads_total=MODEL.num_kv_heads,
            tp_rank=0,
            tp_size=1,
            block_size=facts.geometry.block_size,
            head_dim=MODEL.head_dim,
            dtype="float32",
        )
        announcer = Announcer(
            lambda command: self.announced.append((rank, command)),
            cp_rank=rank,
            block_size=facts.geometry.block_size,
            groups=facts.layer_groups,
        )
        model = ArithmeticModel(MODEL, SingleRank())
        return PrefillRunner(rank, model, KVPool(layout), self.ring.comm(rank), announcer)

    def step(self) -> PrefillPlan | None:
        scheduler = self.pool.scheduler
        plan = scheduler.schedule(self.pool.now)
        if plan is None:
            return None
        with ThreadPoolExecutor(len(self.runners)) as threads:
            futures = [threads.submit(runner.execute, plan) for runner in self.runners]
            results = [future.result(BUDGET_S) for future in futures]
        self.ring.assert_idle()
        self.pool.now += 1.0
        scheduler.update(plan, results, self.pool.now)
        self.pool.take()
        return plan

    def run(self) -> set[int]:
        """To the end; the ring sizes that were seen."""
        sizes: set[int] = set()
        for _ in range(500):
            plan = self.step()
            committed = list(self.pool.commits)
            for key in committed:
                self.check_manifest(*key)
                self.pool.close(*key)
                del self.pool.commits[key]
            if plan is not None:
                sizes |= {len(work.ring) for work in plan.work}
            elif not committed:
                return sizes
        raise AssertionError("it does not end")

    def check_manifest(self, request_id: str, attempt: int) -> None:
        own = [
            (rank, command)
            for rank, command in self.announced
            if (command.request_id, command.attempt) == (request_id, attempt)
        ]
        assert {rank for rank, command in own if isinstance(command, AnnouncedAll)} == set(
            range(len(self.runners))
        )
        segments = {
            SegmentKey(rank, command.chunk, command.layer_start, command.layer_end)
            for rank, command in own
            if isinstance(command, AnnounceBlocks)
        }
        assert segments == set(self.pool.commits[request_id, attempt].manifest)


def first_tokens(pool: Any) -> dict[str, int]:
    return {message.request_id: message.token_id for message in pool.of(FirstToken)}


def right_tokens(prompts: list[Prefill]) -> dict[str, int]:
    return {
        prompt.request_id: expected_tokens(MODEL, prompt.prompt_token_ids, 1)[0]
        for prompt in prompts
    }


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_first_tokens_are_exact(make_pool: Callable, prompt: Callable, cp_size: int) -> None:
    pool = make_pool(cp_size, num_blocks=1000, chunk_tokens=32, ring_from=90)
    ranks = Ranks(pool)
    prompts = [prompt(f"r{i}", n, first=31 * i) for i, n in enumerate(NUM_TOKENS)]
    for message in prompts:
        pool.add(message)
    sizes = ranks.run()
    assert first_tokens(pool) == right_tokens(prompts)
    assert {1, cp_size} <= sizes
    pool.scheduler.check()

    # Each again and longer: now most of it is cached, on whichever ranks.
    pool.messages.clear()
    longer = [
        msgspec.structs.replace(
            message,
            request_id=f"{message.request_id}b",
            prompt_token_ids=message.prompt_token_ids + tuple(range(70)),
            num_target_tokens=8 if len(message.prompt_token_ids) > 8 else 0,
        )
        for message in prompts
    ]
    for message in longer:
        pool.add(message)
    ranks.run()
    assert first_tokens(pool) == right_tokens(longer)
    firsts = pool.of(FirstToken)
    assert sum(first.path.num_cached_tokens for first in firsts) > 1000


@pytest.mark.parametrize("cp_size", [2, 4])
def test_blocks_used_again_are_never_stale(
    make_pool: Callable, prompt: Callable, cp_size: int
) -> None:
    """A pool so small that every request evicts what the others left."""
    pool = make_pool(cp_size, num_blocks=30, chunk_tokens=16, ring_from=60)
    ranks = Ranks(pool)
    prompts = [
        prompt(f"r{i}", 40 + 37 * (i % 5), first=(0, 400)[i % 2] + i // 6) for i in range(18)
    ]
    for i, message in enumerate(prompts):
        pool.add(message)
        ranks.step()
        if i % 5 == 4:
            pool.abort(message.request_id)
            if (message.request_id, 1) in pool.closing:
                pool.close(message.request_id, committed=False)
            pool.commits.pop((message.request_id, 1), None)
    ranks.run()
    tokens = first_tokens(pool)
    assert len(tokens) >= 14
    assert tokens.items() <= right_tokens(prompts).items()
    pool.scheduler.check()
