"""A prefill rank, from its start to its loop.

Load the shard, size the KV pool, say HELLO, form the gang and its ring, warm up, measure what
chunks cost, say GangReady. Then the leader leads and the others follow (engine/process.py).
"""

import logging
import time

import torch
import torch.distributed as dist

from engine.boot import start_shard
from engine.kv_memory import LargestStep
from kvcache.blocks import BlockPool
from kvcache.pool import KVPool
from modeling.checkpoint.config import ModelConfig, is_arithmetic
from modeling.matchers import load_matchers
from modeling.model import Model
from prefill.announcer import Announcer
from prefill.config import PrefillConfig
from prefill.facts import PrefillFacts
from prefill.manifest import layer_groups
from prefill.placement import Geometry, PoolCosts
from prefill.runner import PrefillRunner
from prefill.scheduler import PrefillScheduler
from protocol.errors import ConfigError
from protocol.messages import GangReady
from protocol.plans import ChunkWork, PlacedBlock
from ring_attention.comm import GlooRing, NcclRing, RingComm
from ring_attention.context import RingAttention, forward_chunk
from ring_attention.cost import ChunkShape, CostModel
from ring_attention.measure import measure_cost_model

WARM_UP_TOKENS = 32
MEASURED_TOKENS = 128

# The arithmetic model's attention is no matrix product: what a small CPU rank would measure.
ARITHMETIC_COSTS = CostModel(
    attention_flops_per_s=1e10,
    linear_flops_per_s=1e10,
    bandwidth_bytes_per_s=1e9,
    latency_s=3e-4,
)

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
        process = shard.process
        model = shard.model
        comm = open_ring(config, shard.device)
        tokens_per_s = warm_up(config, model, shard.pool)
        costs = measure(config, model, shard.pool, comm)
        groups = layer_groups(shard.model_config.num_layers, config.layers_per_group)
        announcer = Announcer(
            process.submit,
            cp_rank=config.cp_rank,
            block_size=config.block_size,
            groups=groups,
            mark=_mark_stream if shard.device.type == "cuda" else None,
        )
        samples = config.tp_rank == 0  # any cp rank may have a prompt's last token
        matchers = load_matchers(config.model, shard.model_config) if samples else None
        runner = PrefillRunner(config.rank, model, shard.pool, comm, announcer, matchers)
        _log.info("%d blocks of KV, %.0f tokens/s, %s", shard.num_blocks, tokens_per_s, costs)
        process.tell(GangReady(tokens_per_s=tokens_per_s))
        if not config.is_leader:
            process.follow(runner.execute)  # never returns
        scheduler = make_scheduler(config, shard.model_config, shard.num_blocks, costs)
        process.lead(scheduler, runner.execute)


def _mark_stream() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event


def make_scheduler(
    config: PrefillConfig, model: ModelConfig, num_blocks: int, costs: PoolCosts
) -> PrefillScheduler:
    """The scheduler of a pool whose ranks have ``num_blocks`` each."""
    facts = PrefillFacts(
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
    spaces = [BlockPool(num_blocks, config.block_size) for _ in range(config.cp_size)]
    return PrefillScheduler(facts, spaces, costs)


# -- before it serves ------------------------------------------------------------------------------


def open_ring(config: PrefillConfig, device: torch.device) -> RingComm | None:
    """The way to the pool's other cp ranks, or None if there are none. Collective over the gang.

    Raises:
        ConfigError: several ranks to one GPU; neither NCCL nor gloo carries rings then.
    """
    if config.cp_size == 1:
        return None
    if device.type != "cuda":
        return GlooRing(
            tp_size=config.tp_size, tp_rank=config.tp_rank, timeout_s=config.step_timeout_s
        )
    if torch.cuda.device_count() < config.world_size:
        raise ConfigError(
            f"{config.pool_id}: a ring of {config.world_size} ranks needs as many GPUs, "
            f"{torch.cuda.device_count()} are here: choose a smaller degree or --device cpu"
        )
    group = dist.new_group(list(range(config.world_size)), backend="nccl")
    return NcclRing(group, tp_size=config.tp_size, tp_rank=config.tp_rank)


def warm_up(config: PrefillConfig, model: Model, pool: KVPool) -> float:
    """Run the model on this cp rank alone, twice; the tokens per second of the whole pool."""
    _forward(config, model, pool, WARM_UP_TOKENS)
    started = time.perf_counter()
    num_tokens = _forward(config, model, pool, MEASURED_TOKENS)
    return config.cp_size * num_tokens / (time.perf_counter() - started)


@torch.inference_mode()
def _forward(config: PrefillConfig, model: Model, pool: KVPool, num_tokens: int) -> int:
    layout = pool.layout
    limit = min(layout.num_blocks * layout.block_size, model.config.max_model_len)
    num_tokens = min(num_tokens, limit)
    num_blocks = -(-num_tokens // layout.block_size)
    work = ChunkWork(
        request_id="warm-up",
        attempt=0,
        chunk=1,
        start=0,
        token_ids=(0,) * num_tokens,
        ring=(config.cp_rank,),
        pass_q=False,
        blocks=tuple(
            PlacedBlock(logical=i, cp_rank=config.cp_rank, block_id=i, generation=0)
            for i in range(num_blocks)
        ),
        is_last=False,
    )
    context = RingAttention(work, config.cp_rank, pool, None, model.kernel, model.config)
    hidden_TD = forward_chunk(model, context)
    assert hidden_TD is not None, "a ring of one computes all tokens"
    model.logits(hidden_TD[-1:]).sum().item()  # waits for the device
    return num_tokens


def measure(config: PrefillConfig, model: Model, pool: KVPool, comm: RingComm | None) -> PoolCosts:
    """Measure the cost of chunks. Every rank of the gang calls it; the leader's figures count."""
    shape = ChunkShape.of(
        model.config,
        tp_size=config.tp_size,
        dtype=pool.layout.dtype,
        block_size=config.block_size,
    )
    if is_arithmetic(config.model):
        costs = ARITHMETIC_COSTS
    else:
        costs = measure_cost_model(
            model.kernel,
            shape,
            model.dtype,
            model.device,
            comm=comm,
            ring=tuple(range(config.cp_size)),
            cp_rank=config.cp_rank,
        )
    return PoolCosts(costs, shape, config.ring_threshold_tokens)
