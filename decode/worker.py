"""A decode rank, from its start to its loop.

Load the shard, size the KV pool, say HELLO, form the gang, warm up, measure, say GangReady. Then
the leader leads and the others follow (engine/process.py).
"""

import gc
import logging
import math
from dataclasses import dataclass

import msgspec

from decode.config import DecodeConfig
from decode.facts import DecodeFacts
from decode.runner import DecodeRunner, sampling_row
from decode.scheduler import DecodeScheduler
from engine.boot import start_shard
from engine.kv_memory import LargestStep
from kvcache.blocks import BlockPool
from modeling.checkpoint.config import ModelConfig
from modeling.matchers import load_matchers
from modeling.sampling import SamplingRow
from protocol.kv import KVLayout
from protocol.messages import GangReady
from protocol.plans import DecodePlan, NewSequence, SequenceStep, StepResult
from protocol.request import SamplingParams

CHUNK_TOKENS = 128
NUM_DECODING = 8
NUM_DECODE_STEPS = 4
_NAME = "warm-up"

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
        gc.freeze()  # or collections in the middle of a step would walk all objects of the model
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
    facts = DecodeFacts(
        model_fingerprint=model.fingerprint,
        max_model_len=model.max_model_len,
        token_budget=config.token_budget,
        max_num_sequences=config.max_num_sequences,
        watermark_blocks=math.ceil(config.watermark * layout.num_blocks),
        max_swapped_blocks=config.swap_memory_bytes // bytes_per_block,
        min_tokens_to_load=config.store_threshold_tokens,
    )
    return DecodeScheduler(facts, BlockPool(layout.num_blocks, layout.block_size))


# -- before it serves ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Speed:
    """Of a short prompt computed here, and of a small decoding batch; 0 when not measured."""

    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0


def warm_up(runner: DecodeRunner, layout: KVLayout, model: ModelConfig) -> Speed:
    """Run the model once in each of its two ways, then once more with a watch.

    Every rank runs the same few plans on blocks that no sequence holds yet. Their number is fixed
    and not decided by a clock, because each plan is a collective.

    Args:
        runner: one that has executed nothing yet.
        layout: of its pool.
        model: of the whole model.
    """
    if model.architecture == "arithmetic":
        return Speed()
    num_blocks = -(-CHUNK_TOKENS // layout.block_size)
    num_chunk = min(CHUNK_TOKENS, layout.num_blocks * layout.block_size, model.max_model_len)
    blocks = tuple(range(min(num_blocks, layout.num_blocks)))
    num_decoding = min(NUM_DECODING, layout.num_blocks)
    new = [NewSequence(_NAME, 0, block_ids=blocks)]
    new += [NewSequence(_NAME, 1 + i, block_ids=(i,)) for i in range(num_decoding)]
    chunk = SequenceStep(_NAME, 0, start=0, token_ids=(0,) * num_chunk)
    _run(runner, (chunk,), tuple(new))
    prefill_s = _run(runner, (chunk,))
    decoding = tuple(
        SequenceStep(_NAME, 1 + i, start=0, token_ids=(0,)) for i in range(num_decoding)
    )
    _run(runner, decoding)
    decode_s = sum(_run(runner, decoding) for _ in range(NUM_DECODE_STEPS))
    dropped = tuple(sequence.key for sequence in new)
    runner.execute(DecodePlan(step=0, sequences=(), dropped=dropped))
    return Speed(num_chunk / prefill_s, num_decoding * NUM_DECODE_STEPS / decode_s)


def _run(
    runner: DecodeRunner, steps: tuple[SequenceStep, ...], new: tuple[NewSequence, ...] = ()
) -> float:
    """Seconds that the plan took."""
    row = SamplingRow(
        params=SamplingParams(max_tokens=1, temperature=0.0),
        index=0,
        prompt_token_ids=(),
        output_token_ids=(),
    )
    return runner.execute(DecodePlan(0, steps, new=new), [row] * len(steps)).compute_s
