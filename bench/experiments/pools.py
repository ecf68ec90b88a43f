"""Pools on virtual time: the production schedulers as they are, and a watch in place of a device.

A plan takes as long as the step-time model says, and brings a token for whoever is sampled. The
token is the end of the answer when the answer has the length that was drawn for it, as an
end-of-sequence token would be; the scheduler does not know before.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Generic

from bench.experiments.step_time import StepTime
from bench.simulation.leader import VirtualLeader
from bench.simulation.world import Weather, World
from decode.batch import SchedulerLimits
from decode.scheduler import DecodeScheduler
from engine.leader_node import LeaderNode, P
from kvcache.blocks import BlockPool
from kvtransfer.events import (
    CloseSource,
    CloseTarget,
    Command,
    CommitWhenRead,
    OpenTargetBlocks,
    SendControl,
    SourceClosed,
    TargetClosed,
    TargetIsOpen,
)
from prefill.facts import PoolFacts
from prefill.manifest import layer_groups
from prefill.placement import Geometry
from prefill.scheduler import PrefillScheduler
from protocol.messages import ToCoordinator
from protocol.plans import ChunkWork, DecodePlan, PrefillPlan, SampledToken, StepResult

FINGERPRINT = "experiment"
BLOCK_SIZE = 32
MAX_MODEL_LEN = 1 << 20
VOCAB_SIZE = 1 << 31
PLAIN_TOKEN, LAST_TOKEN = 2, 3
TURN_S = 1e-9  # what arrives at the same moment is taken in together

Tell = Callable[[str, ToCoordinator], None]
Commit = Callable[[CommitWhenRead], None]


def calm_world() -> World:
    """Virtual time without accidents."""
    return World(0, Weather())


@dataclass(slots=True)
class Usage:
    """What a pool has done with its time."""

    num_steps: int = 0
    busy_s: float = 0.0
    seq_s: float = 0.0  # time of each step times the sequences it sampled
    num_chunk_tokens: int = 0


class VirtualPool(VirtualLeader[P], Generic[P]):
    """A pool whose steps take as long as the step-time model says.

    Args:
        world: its clock.
        node: decides.
        overhead_s: added to every step.
    """

    def __init__(self, world: World, node: LeaderNode[P], overhead_s: float) -> None:
        super().__init__(world, node, TURN_S)
        self.usage = Usage()
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
    """A decode pool.

    Args:
        lengths: how many tokens the answer to each request has; shared with whoever adds requests.
        tell: takes what it says to the coordinator.
    """

    def __init__(
        self,
        world: World,
        pool_id: str,
        steps: StepTime,
        setting: DecodeSetting,
        lengths: dict[str, int],
        tell: Tell,
    ) -> None:  # fmt: skip
        pool = BlockPool(setting.num_blocks, setting.block_size)
        limits = SchedulerLimits(MAX_MODEL_LEN, setting.token_budget, setting.max_num_sequences)
        self._scheduler = DecodeScheduler(pool, limits, FINGERPRINT)
        super().__init__(world, self._scheduler, setting.overhead_s)
        self.pool_id = pool_id
        self.setting = setting
        self._steps = steps
        self._lengths = lengths
        self._tell = tell

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
        seconds = self._steps.step_s(num_seqs, sum_kv, chunks) * self.setting.slowness
        self.usage.seq_s += num_seqs * seconds
        self.usage.num_chunk_tokens += sum(new for new, _ in chunks)
        return seconds

    def _execute(self, plan: DecodePlan) -> list[StepResult]:
        tokens = []
        for sequence in self._scheduler.sampled(plan):
            is_last = sequence.num_generated_tokens + 1 >= self._lengths[sequence.key[0]]
            tokens.append(SampledToken(*sequence.key, LAST_TOKEN if is_last else PLAIN_TOKEN))
        return [StepResult(plan.step, 0, tuple(tokens))]

    def _do(self, command: Command) -> None:
        match command:
            case SendControl(message):
                self._tell(self.pool_id, message)
            case OpenTargetBlocks(request_id, attempt):
                self.on_event(TargetIsOpen(request_id, attempt))
            case CloseTarget(request_id, attempt):
                self.on_event(TargetClosed(request_id, attempt))


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
    """A prefill pool.

    Args:
        lengths: as of a decode pool: an answer of one token ends here.
        tell: takes what it says to the coordinator.
        commit: is told what is to be handed over, when the last chunk is computed.
    """

    def __init__(
        self,
        world: World,
        pool_id: str,
        steps: StepTime,
        setting: PrefillSetting,
        lengths: dict[str, int],
        wires: tuple[Tell, Commit],
    ) -> None:  # fmt: skip
        facts = PoolFacts(
            pool_id=pool_id,
            geometry=Geometry(setting.cp_size, BLOCK_SIZE, setting.chunk_tokens),
            tp_size=1,
            num_blocks=setting.num_blocks,
            layer_groups=layer_groups(steps.costs.shape.num_layers, 0),
            model_fingerprint=FINGERPRINT,
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
            max_num_sequences=setting.max_num_sequences,
            step_target_s=setting.step_target_s,
        )
        super().__init__(world, PrefillScheduler(facts, steps.costs), setting.overhead_s)
        self.pool_id = pool_id
        self.setting = setting
        self._steps = steps
        self._lengths = lengths
        self._tell, self._commit = wires

    def _plan_s(self, plan: PrefillPlan) -> float:
        """Each rank executes its items in the plan's order; a ring starts when all of it can."""
        free_s = [0.0] * self.setting.cp_size
        for work in plan.work:
            num_tokens, size = len(work.token_ids), len(work.ring)
            started_s = max(free_s[rank] for rank in work.ring)
            ended_s = started_s + self._steps.chunk_s(num_tokens, work.start, size)
            for rank in work.ring:
                free_s[rank] = ended_s
            self.usage.num_chunk_tokens += num_tokens
        return max(free_s)

    def _execute(self, plan: PrefillPlan) -> list[StepResult]:
        tokens = tuple(self._sample(work) for work in plan.work if work.is_last)
        return [StepResult(plan.step, 0, tokens)]

    def _sample(self, work: ChunkWork) -> SampledToken:
        is_last = self._lengths[work.request_id] <= 1
        token_id = LAST_TOKEN if is_last else PLAIN_TOKEN
        return SampledToken(work.request_id, work.attempt, token_id)

    def _do(self, command: Command) -> None:
        match command:
            case SendControl(message):
                self._tell(self.pool_id, message)
            case CommitWhenRead():
                self._commit(command)
            case CloseSource(request_id, attempt):
                self.on_event(SourceClosed(request_id, attempt, False))


def seeded(*parts: object) -> Random:
    """A generator for one purpose: the same in every process."""
    return Random(" ".join(map(str, parts)))
