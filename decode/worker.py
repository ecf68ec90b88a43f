"""The loop of a decode rank.

1. Load the shard, size the KV pool, say HELLO, form the gang, warm up, measure: GangReady.
2. The leader: take in events, schedule, pass on what follows, have every rank execute the plan,
   update. With nothing to do it blocks until an event comes.
3. A follower executes the leader's plans.

The leader does not wait for its followers at a step's end: the step's last collective has shown
that they are past every use of KV. It waits for their results one step later, which bounds how far
they may lag and finds the one that hangs.
"""

import gc
import logging
import math
import time

import msgspec

from decode.batch import SchedulerLimits
from decode.config import DecodeConfig
from decode.runner import DecodeRunner, sampling_row
from decode.scheduler import DecodeScheduler
from decode.startup import Speed, warm_up
from kvcache.blocks import BlockPool
from kvtransfer.boot import start_shard
from kvtransfer.kv_memory import LargestStep
from kvtransfer.process import RankProcess
from modeling.config import ModelConfig
from protocol.kv import KVLayout
from protocol.messages import GangReady
from protocol.plans import DecodePlan

IDLE_WAIT_S = 5.0

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
        runner = DecodeRunner(config.rank, shard.model, shard.pool)
        layout = msgspec.structs.replace(shard.pool.layout, num_blocks=shard.num_blocks)
        speed = warm_up(runner, layout, shard.model_config)
        _log.info("%d blocks of KV, %s", layout.num_blocks, speed)
        process.tell(GangReady(tokens_per_s=speed.prefill_tokens_per_s))
        gc.collect()
        gc.freeze()  # a model's many small objects need not be walked in the middle of a step
        if config.is_leader:
            scheduler = make_scheduler(config, shard.model_config, layout)
            Leader(process, scheduler, runner, speed, config.step_timeout_s).run()
        else:
            process.follow(runner.execute)


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


class Leader:
    """Rank 0's loop."""

    def __init__(
        self,
        process: RankProcess,
        scheduler: DecodeScheduler,
        runner: DecodeRunner,
        speed: Speed,
        step_timeout_s: float,
    ) -> None:
        self._process = process
        self._scheduler = scheduler
        self._runner = runner
        self._step_timeout_s = step_timeout_s
        self._uncollected: int | None = None  # the step whose results are still to come
        self._fixed_counters = (("decode_tokens_per_s_at_start", speed.decode_tokens_per_s),)

    def run(self) -> None:
        """Serve; never returns but by an exception."""
        wait_s = 0.0
        while True:
            for event in self._process.drain(wait_s):
                self._scheduler.on_event(event, time.monotonic())
            plan = self._scheduler.schedule(time.monotonic())
            self._pass_on()
            if plan is None:
                wait_s = IDLE_WAIT_S
                self._report(is_step=False)
            else:
                wait_s = 0.0
                self._step(plan)

    def _step(self, plan: DecodePlan) -> None:
        process, scheduler = self._process, self._scheduler
        assert process.leader is not None, "only the leader leads"
        process.begin_step()
        if self._uncollected is not None:
            process.leader.collect(self._uncollected, self._step_timeout_s, process.check)
        process.leader.broadcast(plan)
        self._uncollected = plan.step
        rows = [sampling_row(sequence) for sequence in scheduler.sampled(plan)]
        result = self._runner.execute(plan, rows)
        scheduler.update(plan, (*result.tokens, *result.failed), time.monotonic())
        self._pass_on()
        self._report(is_step=True)

    def _pass_on(self) -> None:
        for command in self._scheduler.take_commands():
            self._process.submit(command)

    def _report(self, *, is_step: bool) -> None:
        load = self._scheduler.load()
        report = self._process.end_step if is_step else self._process.report
        report(
            num_waiting=load.num_waiting,
            num_running=load.num_running,
            pending_tokens=load.pending_tokens,
            blocks=(load.blocks,),
            counters=(*load.counters.items(), *self._fixed_counters),
        )
