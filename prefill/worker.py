"""A prefill rank: load the shard, size the KV pool, say HELLO, form the gang and its ring, warm up,
measure, say GangReady; then the leader leads and the others follow (engine/process.py).
"""

import logging

from engine.boot import start_shard
from engine.kv_memory import LargestStep
from modeling.checkpoint.config import ModelConfig
from modeling.matchers import load_matchers
from prefill.announcer import Announcer
from prefill.config import PrefillConfig
from prefill.device_announcer import DeviceAnnouncer
from prefill.facts import PoolFacts
from prefill.manifest import layer_groups
from prefill.placement import Geometry
from prefill.runner import PrefillRunner
from prefill.scheduler import PrefillScheduler
from prefill.startup import measure, open_ring, warm_up
from protocol.messages import GangReady

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
        make_announcer = DeviceAnnouncer if shard.device.type == "cuda" else Announcer
        announcer = make_announcer(
            process.submit, cp_rank=config.cp_rank, block_size=config.block_size, groups=groups
        )
        samples = config.tp_rank == 0  # whichever rank of the ring has the prompt's last token
        matchers = load_matchers(config.model, shard.model_config) if samples else None
        runner = PrefillRunner(config.rank, model, shard.pool, comm, announcer, matchers)
        _log.info("%d blocks of KV, %.0f tokens/s, %s", shard.num_blocks, tokens_per_s, costs)
        process.tell(GangReady(tokens_per_s=tokens_per_s))
        if not config.is_leader:
            process.follow(runner.execute)  # never returns
        facts = pool_facts(config, shard.model_config, shard.num_blocks)
        process.lead(PrefillScheduler(facts, costs), runner.execute)


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
