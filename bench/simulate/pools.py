"""Pools whose steps take as long as a model of a machine says: the real nodes, and no device.

A plan brings a token for whoever is sampled. The token is the end of the answer when the answer has
the length that was drawn for it, as an end-of-sequence token would be; the scheduler does not know
before.
"""

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Generic

from bench.simulate.gangs import Gang, Site
from bench.simulate.step_time import StepTime
from decode.facts import DecodeFacts
from decode.scheduler import DecodeScheduler
from engine.leader_node import P
from kvcache.blocks import BlockPool
from kvtransfer.events import Command, CommitWhenRead
from prefill.announcer import Announcer
from prefill.facts import PrefillFacts
from prefill.placement import Geometry
from prefill.scheduler import PrefillScheduler
from protocol.kv import KVLayout
from protocol.plans import ChunkWork, DecodePlan, PrefillPlan, SampledToken, StepResult

FINGERPRINT = "virtual"
BLOCK_SIZE = 32
MAX_MODEL_LEN = 1 << 20
VOCAB_SIZE = 1 << 31
PLAIN_TOKEN, LAST_TOKEN = 2, 3
GROUPS = (range(1),)  # one layer stands for all
PROBE_TOKENS = 128  # of the chunk by which a pool measures its speed when it starts


@dataclass(frozen=True, slots=True)
class Machine:
    """How long steps take, and how long answers are.

    Args:
        steps: the model.
        lengths: tokens of the answer to each request, filled by whoever asks.
    """

    steps: StepTime
    lengths: dict[str, int]


class VirtualPool(Gang[P], Generic[P]):
    """A pool whose steps take as long as the step-time model says.

    Args:
        num_blocks: of each rank.
        overhead_s: added to every step.
    """

    turn_s = 1e-9  # what arrives at the same moment is taken in together

    def __init__(self, site: Site, machine: Machine, *, num_blocks: int, overhead_s: float) -> None:
        self.steps = machine.steps
        self.num_steps = 0
        self.busy_s = 0.0
        self._lengths = machine.lengths
        self._overhead_s = overhead_s
        layout = KVLayout(1, num_blocks, 1, 0, 1, BLOCK_SIZE, 1, "float32")
        super().__init__(site, [layout] * site.spec.num_ranks)

    def _step_s(self, plan: P) -> float:
        seconds = self._plan_s(plan) + self._overhead_s
        self.num_steps += 1
        self.busy_s += seconds
        return seconds

    def _sampled(self, request_id: str, attempt: int, num_before: int) -> SampledToken:
        is_last = num_before + 1 >= self._lengths[request_id]
        return SampledToken(request_id, attempt, LAST_TOKEN if is_last else PLAIN_TOKEN)

    @abstractmethod
    def _plan_s(self, plan: P) -> float:
        """What the step-time model says of a plan."""


@dataclass(frozen=True, slots=True)
class DecodeSetting:
    """A decode pool of one rank; its steps take ``slowness`` times as long as the machine's."""

    token_budget: int = 512
    max_num_sequences: int = 32
    num_blocks: int = 8192
    slowness: float = 1.0
    overhead_s: float = 0.0


class VirtualDecode(VirtualPool[DecodePlan]):
    """A decode pool."""

    def __init__(self, site: Site, machine: Machine, setting: DecodeSetting) -> None:
        self.setting = setting
        self.tokens_per_s = PROBE_TOKENS / (
            machine.steps.step_s(0, 0, [(PROBE_TOKENS, 0)]) * setting.slowness
        )
        super().__init__(
            site, machine, num_blocks=setting.num_blocks, overhead_s=setting.overhead_s
        )

    def _make_node(self) -> DecodeScheduler:
        setting = self.setting
        pool = BlockPool(setting.num_blocks, BLOCK_SIZE)
        facts = DecodeFacts(
            model_fingerprint=FINGERPRINT,
            max_model_len=MAX_MODEL_LEN,
            token_budget=setting.token_budget,
            max_num_sequences=setting.max_num_sequences,
        )
        self._scheduler = DecodeScheduler(facts, pool)
        return self._scheduler

    def _plan_s(self, plan: DecodePlan) -> float:
        if not plan.sequences:
            return 0.0  # sequences are dropped, nothing is computed
        num_seqs = sum_kv = 0
        chunks: list[tuple[int, int]] = []
        for step in plan.sequences:
            if len(step.token_ids) == 1:
                num_seqs += 1
                sum_kv += step.start + 1
            else:
                chunks.append((len(step.token_ids), step.start))
        return self.steps.step_s(num_seqs, sum_kv, chunks) * self.setting.slowness

    def _execute(self, plan: DecodePlan) -> list[StepResult]:
        tokens = tuple(
            self._sampled(*sequence.key, sequence.num_generated_tokens)
            for sequence in self._scheduler.sampled(plan)
        )
        return [StepResult(plan.step, 0, tokens)]


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

    def __init__(self, site: Site, machine: Machine, setting: PrefillSetting) -> None:
        self.setting = setting
        alone_s = machine.steps.chunk_s(PROBE_TOKENS, 0, 1)
        self.tokens_per_s = setting.cp_size * PROBE_TOKENS / alone_s
        super().__init__(
            site, machine, num_blocks=setting.num_blocks, overhead_s=setting.overhead_s
        )

    def _make_node(self) -> PrefillScheduler:
        setting = self.setting
        self._announcers = [
            Announcer(
                rank.command, cp_rank=rank.identity.cp_rank, block_size=BLOCK_SIZE, groups=GROUPS
            )
            for rank in self.ranks
        ]
        facts = PrefillFacts(
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
        spaces = [BlockPool(setting.num_blocks, BLOCK_SIZE) for _ in range(setting.cp_size)]
        return PrefillScheduler(facts, spaces, self.steps.costs)

    def _plan_s(self, plan: PrefillPlan) -> float:
        """Each rank executes its items in the plan's order; a ring starts when all of it can."""
        free_s = [0.0] * self.setting.cp_size
        for work in plan.work:
            started_s = max(free_s[rank] for rank in work.ring)
            took_s = self.steps.chunk_s(len(work.token_ids), work.start, len(work.ring))
            for rank in work.ring:
                free_s[rank] = started_s + took_s
        return max(free_s)

    def _execute(self, plan: PrefillPlan) -> list[StepResult]:
        for work in plan.work:
            for announcer in self._announcers:
                announcer.play(work)
        tokens = tuple(self._first(work) for work in plan.work if work.is_last)
        return [StepResult(plan.step, 0, tokens)]

    def _first(self, work: ChunkWork) -> SampledToken:
        return self._sampled(work.request_id, work.attempt, 0)

    def _do(self, command: Command) -> None:
        if isinstance(command, CommitWhenRead):  # all but the last bytes have moved meanwhile
            seconds = self.steps.handoff_s(command.num_tokens)
            self.world.at(seconds, partial(self.ranks[0].command, command))
        else:
            super()._do(command)
