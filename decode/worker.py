"""A decode rank: load the shard, size the KV pool, say HELLO, form the gang, warm up, measure, say
GangReady; then the leader leads and the others follow (engine/process.py).
"""

import gc
import logging
import math

import msgspec

from decode.batch import SchedulerLimits
from decode.config import DecodeConfig
from decode.runner import DecodeRunner, sampling_row
from decode.scheduler import DecodeScheduler
from decode.startup import warm_up
from engine.boot import start_shard
from engine.kv_memory import LargestStep
from kvcache.blocks import BlockPool
from modeling.checkpoint.config import ModelConfig
from modeling.matchers import load_matchers
from protocol.kv import KVLayout
from protocol.messages import GangReady
from protocol.plans import DecodePlan, StepResult

_log = logging.getLogger(__name__)


def serve(config: DecodeConfig) -> None:
    """Run a rank until it is stopped.

    Raises:
        ConfigError: it cannot run as configured.
        PeerError: the gang has broken.
        SystemExit: it was asked to stop.
    """
    largest = LargestStep(config.token_budget, config.max_num_sequences, config.max_num_sequences)
    with start_shard("decode", config, largest) as shard:
        process = shard.process
        matchers = load_matchers(config.model, shard.model_config) if config.is_leader else None
        runner = DecodeRunner(config.rank, shard.model, shard.pool, matchers)
        layout = msgspec.structs.replace(shard.pool.layout, num_blocks=shard.num_blocks)
        speed = warm_up(runner, layout, shard.model_config)
        _log.info("%d blocks of KV, %s", layout.num_blocks, speed)
        process.tell(GangReady(tokens_per_s=speed.prefill_tokens_per_s))
        gc.collect()
        gc.freeze()  # a model's many small objects need not be walked in the middle of a step
        if not config.is_leader:
            process.follow(runner.execute)  # never returns
        scheduler = make_scheduler(config, shard.model_config, layout)

        def execute(plan: DecodePlan) -> StepResult:
            return runner.execute(plan, [sampling_row(s) for s in scheduler.sampled(plan)])

        process.lead(
            scheduler,
            execute,
            needs_followers=False,  # rank 0 alone samples
            counters={"decode_tokens_per_s_at_start": speed.decode_tokens_per_s},
        )


def make_scheduler(config: DecodeConfig, model: ModelConfig, layout: KVLayout) -> DecodeScheduler:
    """The scheduler of a pool whose ranks all have ``layout``'s number of blocks."""
    bytes_per_block = layout.num_bytes // layout.num_blocks
    limits = SchedulerLimits(
        max_model_len=model.max_model_len,
        token_budget=config.token_budget,
        max_num_sequences=config.max_num_sequences,
        watermark_blocks=math.ceil(config.watermark * layout.num_blocks),
        max_swapped_blocks=config.swap_memory_bytes // bytes_per_block,
        min_tokens_to_load=config.store_threshold_tokens,
    )
    pool = BlockPool(layout.num_blocks, layout.block_size)
    return DecodeScheduler(pool, limits, model.fingerprint)
