"""The loop of a prefill rank.

1. Load the shard, size the KV pool, say HELLO, form the gang, warm up, measure: GangReady.
2. The leader: take in events, schedule, have every rank execute the plan, update, pass on what
   follows from it. With nothing to do it blocks until an event comes.
3. A follower executes the leader's plans.
"""

import logging
import time
from collections.abc import Callable
from functools import partial

from kvtransfer.boot import start_shard
from kvtransfer.kv_memory import LargestStep
from kvtransfer.process import RankProcess
from modeling.config import ModelConfig
from prefill.announcer import Announcer
from prefill.config import PrefillConfig
from prefill.facts import PoolFacts
from prefill.manifest import layer_groups
from prefill.placement import Geometry
from prefill.runner import PrefillRunner
from prefill.scheduler import PrefillScheduler
from prefill.startup import measure, open_ring, warm_up
from protocol.messages import GangReady

IDLE_WAIT_S = 5.0

_log = logging.getLogger(__name__)


def serve(config: PrefillConfig) -> None:
    """Run a rank until it is stopped.

    Raises:
        ConfigError: it cannot run as configured.
        PeerError: the gang has broken.
        SystemExit: it was asked to stop.
    """
    largest = LargestStep(config.chunk_tokens, 1, config.max_num_sequences)
    with start_shard("prefill", config, largest) as shard:
        process, model = shard.process, shard.model
        comm = open_ring(config, shard.device)
        tokens_per_s = warm_up(config, model, shard.pool)
        costs = measure(config, model, shard.pool, comm)
        groups = layer_groups(shard.model_config.num_layers, config.layers_per_group)
        announcer = Announcer(
            process.submit,
            cp_rank=config.cp_rank,
            block_size=config.block_size,
            groups=groups,
            device=shard.device,
        )
        runner = PrefillRunner(config.rank, model, shard.pool, comm, announcer)
        _log.info("%d blocks of KV, %.0f tokens/s, %s", shard.num_blocks, tokens_per_s, costs)
        process.tell(GangReady(tokens_per_s=tokens_per_s))
        if config.is_leader:
            facts = pool_facts(config, shard.model_config, shard.num_blocks)
            lead(process, PrefillScheduler(facts, costs), runner)
        else:
            process.follow(runner.execute)


def pool_facts(config: PrefillConfig, model: ModelConfig, num_blocks: int) -> PoolFacts:
    """What the scheduler goes by; ``num_blocks`` are of each rank."""
    return PoolFacts(
        pool_id=config.pool_id,
        geometry=Geometry(config.cp_size, config.block_size, config.chunk_tokens),
        tp_size=config.tp_size,
        num_blocks=num_blocks,
        layer_groups=layer_groups(model.num_layers, config.layers_per_group),
        model_fingerprint=model.fingerprint,
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        max_num_sequences=config.max_num_sequences,
        step_target_s=config.step_target_s,
        fetch_threshold_tokens=config.fetch_threshold_tokens,
        fetch_timeout_s=config.fetch_timeout_s,
    )


def lead(process: RankProcess, scheduler: PrefillScheduler, runner: PrefillRunner) -> None:
    """The leader's loop; never returns but by an exception."""
    wait_s = 0.0
    while True:
        for event in process.drain(wait_s):
            for command in scheduler.on_event(event, time.monotonic()):
                process.submit(command)
        plan = scheduler.schedule(time.monotonic())
        for command in scheduler.take_commands():
            process.submit(command)
        if plan is None:
            wait_s = IDLE_WAIT_S
            _report(process.report, scheduler)
            continue
        wait_s = 0.0
        process.begin_step()
        results = process.step(plan.step, plan, partial(runner.execute, plan))
        for command in scheduler.update(plan, results, time.monotonic()):
            process.submit(command)
        _report(process.end_step, scheduler)


def _report(report: Callable[..., None], scheduler: PrefillScheduler) -> None:
    load = scheduler.load()
    report(
        num_waiting=load.num_waiting,
        num_running=load.num_running,
        pending_tokens=load.pending_tokens,
        blocks=load.blocks,
        counters=(
            ("prefill_computed_tokens", float(scheduler.num_computed_tokens)),
            ("prefill_cached_tokens", float(scheduler.num_cached_tokens)),
            ("prefill_fetched_tokens", float(scheduler.num_fetched_tokens)),
        ),
    )
