"""Pools on virtual time: the production nodes as they are, and a watch in place of a device.

A plan takes as long as the step-time model says, and brings a token for whoever is sampled. The
token is the end of the answer when the answer has the length that was drawn for it, as an
end-of-sequence token would be; the scheduler does not know before.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Generic

from bench.simulate.step_time import StepTime
from coordinator.config import ExpectedPool
from decode.batch import SchedulerLimits
from decode.scheduler import DecodeScheduler
from engine.leader_node import P
from kvcache.blocks import BlockPool
from kvtransfer.events import Command, CommitWhenRead
from prefill.announcer import Announcer
from prefill.facts import PoolFacts
from prefill.placement import Geometry
from prefill.scheduler import PrefillScheduler
from protocol.kv import KVLayout
from protocol.messages import ToCoordinator
from protocol.plans import ChunkWork, DecodePlan, PrefillPlan, SampledToken, StepResult
from tests.simulation.gangs import Gang
from tests.simulation.ranks import Rank
from tests.simulation.world import EventLoop, FaultModel

FINGERPRINT = "experiment"
BLOCK_SIZE = 32
MAX_MODEL_LEN = 1 << 20
VOCAB_SIZE = 1 << 31
PLAIN_TOKEN, LAST_TOKEN = 2, 3
GROUPS = (range(1),)  # one layer stands for all

Tell = Callable[[ToCoordinator], None]


def calm_world() -> EventLoop:
    """Virtual time without accidents, in which messages and bytes take none."""
    return EventLoop(0, FaultModel(delay_s=0.0, read_s=0.0))


@dataclass(slots=True)
class Usage:
    """What a pool has done with its time."""

    num_steps: int = 0
    busy_s: float = 0.0
    seq_s: float = 0.0  # time of each step times the sequences it sampled
    num_chunk_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Site:
    """What the pools of a cluster have in common.

    ``lengths`` is how many tokens the answer to each request has, shared with whoever adds
    requests, and ``everyone`` has all ranks by incarnation.
    """

    world: EventLoop
    steps: StepTime
    lengths: dict[str, int]
    everyone: dict[str, Rank] = field(default_factory=dict)


class VirtualPool(Gang[P], Generic[P]):
    """A pool whose steps take as long as the step-time model says.

    Args:
        site: where it is.
        spec: what it is.
        tell: takes what it says to the coordinator.
        shape: blocks of each rank, and tokens of a block.
        overhead_s: added to every step.
    """

    turn_s = 1e-9  # what arrives at the same moment is taken in together

    def __init__(
        self,
        site: Site,
        spec: ExpectedPool,
        tell: Tell,
        shape: tuple[int, int],
        overhead_s: float,
    ) -> None:
        num_blocks, block_size = shape
        layout = KVLayout(1, num_blocks, 1, 0, 1, block_size, 1, "float32")
        super().__init__(site.world, site.everyone, spec, 1, [layout] * spec.num_ranks, tell)
        self.usage = Usage()
        self._site = site
        self._overhead_s = overhead_s

    def _step_s(self, plan: P) -> float:
        seconds = self._plan_s(plan) + self._overhead_s
        self.usage.num_steps += 1
        self.usage.busy_s += seconds
        return seconds

    @abstractmethod
    def _plan_s(self, plan: P) -> float:
        """What the step-time model says of a plan."""


@dataclass(frozen=True, slots=True)
class DecodeSetting:
    """A decode pool of one rank."""

    token_budget: int = 512
    max_num_sequences: int = 32
    num_blocks: int = 8192
    block_size: int = BLOCK_SIZE
    slowness: float = 1.0  # its steps take so many times as long
    overhead_s: float = 0.0


class VirtualDecode(VirtualPool[DecodePlan]):
    """A decode pool."""

    def __init__(self, site: Site, pool_id: str, setting: DecodeSetting, tell: Tell) -> None:
        self.setting = setting
        shape = (setting.num_blocks, setting.block_size)
        spec = ExpectedPool(pool_id, "decode", 1, 1)
        super().__init__(site, spec, tell, shape, setting.overhead_s)

    def _make_node(self, world: EventLoop) -> DecodeScheduler:
        del world
        setting = self.setting
        pool = BlockPool(setting.num_blocks, setting.block_size)
        limits = SchedulerLimits(MAX_MODEL_LEN, setting.token_budget, setting.max_num_sequences)
        self._scheduler = DecodeScheduler(pool, limits, FINGERPRINT)
        return self._scheduler

    def _plan_s(self, plan: DecodePlan) -> float:
        num_seqs = sum_kv = 0
        chunks: list[tuple[int, int]] = []
        for step in plan.sequences:
            if len(step.token_ids) == 1:
                num_seqs += 1
                sum_kv += step.start + 1
            else:
                chunks.append((len(step.token_ids), step.start))
        if not plan.sequences:
            return 0.0  # sequences are dropped, nothing is computed
        seconds = self._site.steps.step_s(num_seqs, sum_kv, chunks) * self.setting.slowness
        self.usage.seq_s += num_seqs * seconds
        self.usage.num_chunk_tokens += sum(new for new, _ in chunks)
        return seconds

    def _execute(self, plan: DecodePlan) -> list[StepResult]:
        tokens = []
        for sequence in self._scheduler.sampled(plan):
            is_last = sequence.num_generated_tokens + 1 >= self._site.lengths[sequence.key[0]]
            tokens.append(SampledToken(*sequence.key, LAST_TOKEN if is_last else PLAIN_TOKEN))
        return [StepResult(plan.step, 0, tuple(tokens))]


@dataclass(frozen=True, slots=True)
class PrefillSetting:
    """A prefill pool of ``cp_size`` ranks."""

    cp_size: int = 1
    chunk_tokens: int = 2048
    num_blocks: int = 8192  # of each rank
    max_num_sequences: int = 64
    step_target_s: float = 0.25
    overhead_s: float = 0.0


class VirtualPrefill(VirtualPool[PrefillPlan]):
    """A prefill pool. The answer to a request whose answer has one token ends here."""

    def __init__(self, site: Site, pool_id: str, setting: PrefillSetting, tell: Tell) -> None:
        self.setting = setting
        self._costs = site.steps.costs
        shape = (setting.num_blocks, BLOCK_SIZE)
        spec = ExpectedPool(pool_id, "prefill", setting.cp_size, 1)
        super().__init__(site, spec, tell, shape, setting.overhead_s)

    def _make_node(self, world: EventLoop) -> PrefillScheduler:
        del world
        setting = self.setting
        self._announcers = [
            Announcer(
                rank.command, cp_rank=rank.identity.cp_rank, block_size=BLOCK_SIZE, groups=GROUPS
            )
            for rank in self.ranks
        ]
        facts = PoolFacts(
            pool_id=self.spec.pool_id,
            geometry=Geometry(setting.cp_size, BLOCK_SIZE, setting.chunk_tokens),
            tp_size=1,
            num_blocks=setting.num_blocks,
            layer_groups=GROUPS,
            model_fingerprint=FINGERPRINT,
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
            max_num_sequences=setting.max_num_sequences,
            step_target_s=setting.step_target_s,
        )
        return PrefillScheduler(facts, self._costs)

    def _plan_s(self, plan: PrefillPlan) -> float:
        """Each rank executes its items in the plan's order; a ring starts when all of it can."""
        free_s = [0.0] * self.setting.cp_size
        for work in plan.work:
            num_tokens, size = len(work.token_ids), len(work.ring)
            started_s = max(free_s[rank] for rank in work.ring)
            ended_s = started_s + self._site.steps.chunk_s(num_tokens, work.start, size)
            for rank in work.ring:
                free_s[rank] = ended_s
            self.usage.num_chunk_tokens += num_tokens
        return max(free_s)

    def _execute(self, plan: PrefillPlan) -> list[StepResult]:
        for work in plan.work:
            for announcer in self._announcers:
                announcer.play(work)
        tokens = tuple(self._sample(work) for work in plan.work if work.is_last)
        return [StepResult(plan.step, 0, tokens)]

    def _sample(self, work: ChunkWork) -> SampledToken:
        is_last = self._site.lengths[work.request_id] <= 1
        token_id = LAST_TOKEN if is_last else PLAIN_TOKEN
        return SampledToken(work.request_id, work.attempt, token_id)

    def _do(self, command: Command) -> None:
        if isinstance(command, CommitWhenRead):  # all but the last bytes have moved meanwhile
            seconds = self._site.steps.handoff_s(command.num_tokens)
            self.world.at(seconds, partial(self.ranks[0].command, command))
        else:
            super()._do(command)


def seeded(*parts: object) -> Random:
    """A generator for one purpose: the same in every process."""
    return Random(" ".join(map(str, parts)))
