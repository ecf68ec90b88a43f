"""Pools on virtual time: the production schedulers as they are, and a watch in place of a device.

The life of a step, as in a real leader's loop: take in what has come, ``schedule``, let the plan
take as long as the step-time model says, ``update`` with a token for whoever is sampled. The token
is the end of the answer when the answer has the length that was drawn for it, as an end-of-sequence
token would be; the scheduler does not know before.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from bench.experiments.step_time import StepTime
from bench.simulation.world import Weather, World
from decode.batch import SchedulerLimits
from decode.scheduler import DecodeScheduler
from kvcache.blocks import BlockPool
from kvtransfer.events import (
    CloseSource,
    CloseTarget,
    Command,
    CommitWhenRead,
    Event,
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


class VirtualPool(ABC):
    """A leader's loop on virtual time.

    Args:
        world: its clock.
        pool_id: its name.
        steps: how long they take.
        overhead_s: added to every step.
    """

    def __init__(self, world: World, pool_id: str, steps: StepTime, overhead_s: float) -> None:
        self.pool_id = pool_id
        self.usage = Usage()
        self._world = world
        self._steps = steps
        self._overhead_s = overhead_s
        self._events: deque[Event] = deque()
        self._is_busy = False

    def on_event(self, event: Event) -> None:
        self._events.append(event)
        self._wake()

    def _wake(self) -> None:
        if not self._is_busy:
            self._is_busy = True
            self._world.at(TURN_S, self._turn)

    def _turn(self) -> None:
        while self._events:
            self._obey(self._take(self._events.popleft()))
        begun = self._begin()
        if begun is None:
            self._is_busy = False
            if self._events:  # what the commands of this very turn have brought
                self._wake()
            return
        seconds, finish = begun
        seconds += self._overhead_s
        self.usage.num_steps += 1
        self.usage.busy_s += seconds
        self._world.at(seconds, partial(self._end, finish))

    def _end(self, finish: Callable[[], Sequence[Command]]) -> None:
        self._obey(finish())
        self._is_busy = False
        self._wake()

    def _obey(self, commands: Sequence[Command]) -> None:
        for command in commands:
            self._do(command)

    @abstractmethod
    def _take(self, event: Event) -> Sequence[Command]:
        """Hand an event to the scheduler."""

    @abstractmethod
    def _begin(self) -> tuple[float, Callable[[], Sequence[Command]]] | None:
        """Start a step: how long it takes, and what ends it."""

    @abstractmethod
    def _do(self, command: Command) -> None:
        """What a transfer thread would do."""


@dataclass(frozen=True, slots=True)
class DecodeSetting:
    """A decode pool of one rank."""

    token_budget: int = 512
    max_num_sequences: int = 32
    num_blocks: int = 8192
    block_size: int = BLOCK_SIZE
    slowness: float = 1.0  # its steps take so many times as long
    overhead_s: float = 0.0


class VirtualDecode(VirtualPool):
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
        super().__init__(world, pool_id, steps, setting.overhead_s)
        self.setting = setting
        self._lengths = lengths
        self._tell = tell
        limits = SchedulerLimits(MAX_MODEL_LEN, setting.token_budget, setting.max_num_sequences)
        self._pool = BlockPool(setting.num_blocks, setting.block_size)
        self.scheduler = DecodeScheduler(self._pool, limits, FINGERPRINT)

    def _take(self, event: Event) -> Sequence[Command]:
        self.scheduler.on_event(event, self._world.now)
        return self.scheduler.take_commands()

    def _begin(self) -> tuple[float, Callable[[], Sequence[Command]]] | None:
        plan = self.scheduler.schedule(self._world.now)
        self._obey(self.scheduler.take_commands())
        if plan is None:
            return None
        seconds = self.plan_s(plan)
        return seconds, partial(self._finish, plan)

    def plan_s(self, plan: DecodePlan) -> float:
        """What the step-time model says of a plan."""
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

    def _finish(self, plan: DecodePlan) -> Sequence[Command]:
        tokens = []
        for sequence in self.scheduler.sampled(plan):
            is_last = sequence.num_generated_tokens + 1 >= self._lengths[sequence.key[0]]
            tokens.append(SampledToken(*sequence.key, LAST_TOKEN if is_last else PLAIN_TOKEN))
        self.scheduler.update(plan, tokens, self._world.now)
        return self.scheduler.take_commands()

    def _do(self, command: Command) -> None:
        match command:
            case SendControl(message):
                self._tell(self.pool_id, message)
            case OpenTargetBlocks(request_id, attempt):
                self.on_event(TargetIsOpen(request_id, attempt))
            case CloseTarget(request_id, attempt):
                self.on_event(TargetClosed(request_id, attempt))

    def check(self) -> None:
        """Assert that every block is accounted for."""
        self._pool.check()


@dataclass(frozen=True, slots=True)
class PrefillSetting:
    """A prefill pool of ``cp_size`` ranks."""

    cp_size: int = 1
    chunk_tokens: int = 2048
    num_blocks: int = 8192  # of each rank
    max_num_sequences: int = 64
    step_target_s: float = 0.25
    overhead_s: float = 0.0


class VirtualPrefill(VirtualPool):
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
        super().__init__(world, pool_id, steps, setting.overhead_s)
        self.setting = setting
        self._lengths = lengths
        self._tell, self._commit = wires
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
        self.scheduler = PrefillScheduler(facts, steps.costs)

    def _take(self, event: Event) -> Sequence[Command]:
        return self.scheduler.on_event(event, self._world.now)

    def _begin(self) -> tuple[float, Callable[[], Sequence[Command]]] | None:
        plan = self.scheduler.schedule(self._world.now)
        self._obey(self.scheduler.take_commands())
        if plan is None:
            return None
        return self.plan_s(plan), partial(self._finish, plan)

    def plan_s(self, plan: PrefillPlan) -> float:
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

    def _finish(self, plan: PrefillPlan) -> Sequence[Command]:
        tokens = tuple(self._sample(work) for work in plan.work if work.is_last)
        return self.scheduler.update(plan, [StepResult(plan.step, 0, tokens)], self._world.now)

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

    def check(self) -> None:
        """Assert that every block is accounted for."""
        self.scheduler.check()


def seeded(*parts: object) -> Random:
    """A generator for one purpose: the same in every process."""
    return Random(" ".join(map(str, parts)))
