"""A gang: its ranks, and its leader's main loop around a real scheduler."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from bench.simulation.model import (
    BLOCK_SIZE,
    NUM_LAYERS,
    VOCAB_SIZE,
    layout,
    states,
    token_of,
)
from bench.simulation.ranks import Rank
from bench.simulation.world import World
from coordinator.config import ExpectedPool
from kvtransfer.events import (
    AnnounceBlocks,
    AnnouncedAll,
    Command,
    ControlReceived,
    Event,
    SendControl,
)
from kvtransfer.identity import RankIdentity
from prefill.blocks import ref_of
from prefill.facts import PoolFacts
from prefill.manifest import CACHED_CHUNK, cached_blocks, layer_groups, moving_blocks
from prefill.placement import Geometry
from prefill.scheduler import PrefillScheduler
from protocol.messages import BlockCounts, Prefill, ToCoordinator
from protocol.plans import (
    ChunkWork,
    PlacedBlock,
    PrefillPlan,
    SampledToken,
    StepResult,
)

FINGERPRINT = "simulated"
MAX_MODEL_LEN = 200
CHUNK_TOKENS = 12
STEP_S = 0.01
FETCH_TIMEOUT_S = 3.0
Key = tuple[str, int]


class Gang(ABC):
    """One life of a pool.

    Args:
        world: its clock.
        everyone: all ranks by incarnation.
        spec: what it is.
        life: counts its starts; 1 is the first.
        num_blocks: of each rank.
        tell: takes what its leader says to the coordinator.
    """

    def __init__(
        self,
        world: World,
        everyone: dict[str, Rank],
        spec: ExpectedPool,
        life: int,
        num_blocks: int,
        tell: Callable[[ToCoordinator], None],
    ) -> None:  # fmt: skip
        self.spec = spec
        self.is_alive = True
        self.paused_until = 0.0
        self.world = world
        self._tell = tell
        self._events: deque[Event] = deque()
        self._is_busy = False
        self.ranks = [
            Rank(
                world,
                everyone,
                self._identity(rank, life),
                layout(num_blocks, rank % spec.tp_size, spec.tp_size),
                self.on_event if rank == 0 else _ignore,
            )
            for rank in range(spec.num_ranks)
        ]
        self._set_up()

    def _identity(self, rank: int, life: int) -> RankIdentity:
        spec = self.spec
        incarnation = f"{spec.pool_id}.{rank}.{life}"
        return RankIdentity(spec.role, spec.pool_id, rank, spec.cp_size, spec.tp_size, incarnation)

    def kill(self) -> None:
        """Nothing of it does anything any more."""
        self.is_alive = False
        for rank in self.ranks:
            rank.is_alive = False

    @property
    def num_open(self) -> int:
        """Hand-offs that are not over, on any rank."""
        return sum(rank.node.num_open for rank in self.ranks)

    # -- the leader's loop -------------------------------------------------------------------------

    def on_event(self, event: Event) -> None:
        self._events.append(event)
        self.wake()

    def wake(self) -> None:
        """Have the leader look, unless it is in a step."""
        if self.is_alive and not self._is_busy:
            self._is_busy = True
            pause_s = max(0.0, self.paused_until - self.world.now)
            self.world.at(pause_s + 0.0001, self._turn)

    def _turn(self) -> None:
        if not self.is_alive:
            return
        while self._events:
            self._obey(self._take(self._events.popleft()))
        finish = self._begin()
        if finish is not None:
            self.world.at(self.world.delay(STEP_S), partial(self._end, finish))
        else:
            self._rest()

    def _end(self, finish: Callable[[], Sequence[Command]]) -> None:
        if self.is_alive:
            self._obey(finish())
            self.check()
            self._is_busy = False
            self.wake()

    def _rest(self) -> None:
        self._is_busy = False
        if self._events:
            self.wake()

    def _obey(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, SendControl):
                self._tell(command.message)
            else:
                self.ranks[0].command(command)

    def greeting(self) -> Sequence[ToCoordinator]:
        """What its leader says when it has met the others."""
        return ()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way that no hand-off and no block tells."""
        return True

    @abstractmethod
    def _set_up(self) -> None:
        """Make the scheduler."""

    @abstractmethod
    def _take(self, event: Event) -> Sequence[Command]:
        """Hand an event to the scheduler."""

    @abstractmethod
    def _begin(self) -> Callable[[], Sequence[Command]] | None:
        """Start a step, if there is something to do; what ends it is called later."""

    @abstractmethod
    def check(self) -> None:
        """Assert that every block is accounted for."""

    @abstractmethod
    def counts(self) -> Sequence[BlockCounts]:
        """Of every block space."""


class FlatCosts:
    """A token costs a millisecond, on any ring."""

    def seconds(self, new: int, cached: int, ring_size: int) -> float:
        return 0.001 * (new + cached / 8) / ring_size

    def prefers_pass_q(self, new: int, cached: int, ring_size: int) -> bool:
        return ring_size > 1 and cached > 4 * new

    def worth_taking(self, new: int, cached: int, ring_sizes: Sequence[int]) -> Sequence[int]:
        return ring_sizes if new + cached > CHUNK_TOKENS else ring_sizes[:1]


class PrefillGang(Gang):
    """A prefill pool."""

    def _set_up(self) -> None:
        spec = self.spec
        self._groups = layer_groups(NUM_LAYERS, 1)
        facts = PoolFacts(
            pool_id=spec.pool_id,
            geometry=Geometry(spec.cp_size, BLOCK_SIZE, CHUNK_TOKENS),
            tp_size=spec.tp_size,
            num_blocks=self.ranks[0].memory.layout.num_blocks,
            layer_groups=self._groups,
            model_fingerprint=FINGERPRINT,
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
            max_num_sequences=4,
            step_target_s=0.02,
            fetch_timeout_s=FETCH_TIMEOUT_S,
        )
        self._scheduler = PrefillScheduler(facts, FlatCosts())
        self._prompts: dict[Key, tuple[int, ...]] = {}

    def _take(self, event: Event) -> Sequence[Command]:
        match event:
            case ControlReceived(message=Prefill() as message):
                self._prompts[message.request_id, message.attempt] = message.prompt_token_ids
        return self._scheduler.on_event(event, self.world.now)

    def _begin(self) -> Callable[[], Sequence[Command]] | None:
        plan = self._scheduler.schedule(self.world.now)
        self._obey(self._scheduler.take_commands())
        return None if plan is None else partial(self._finish, plan)

    def _finish(self, plan: PrefillPlan) -> Sequence[Command]:
        tokens = [token for work in plan.work if (token := self._compute(work)) is not None]
        results = [StepResult(plan.step, 0, tuple(tokens))]
        return self._scheduler.update(plan, results, self.world.now)

    def _compute(self, work: ChunkWork) -> SampledToken | None:
        end = work.start + len(work.token_ids)
        new = self._states_of(work)
        for rank in self.ranks:
            cp_rank = rank.identity.cp_rank
            if cp_rank in work.ring:
                cached = cached_blocks(work, cp_rank)
                self._announce(rank, work, CACHED_CHUNK, range(NUM_LAYERS), cached)
                for group in self._groups:
                    for position, state in enumerate(new, work.start):
                        block = work.blocks[position // BLOCK_SIZE]
                        if block.cp_rank == cp_rank:
                            rank.memory.write(group, block.block_id, position, state)
                    moving = moving_blocks(work, cp_rank, BLOCK_SIZE)
                    self._announce(rank, work, work.chunk, group, moving)
            if work.is_last and work.route is not None:
                key = (work.request_id, work.attempt)
                rank.command(AnnouncedAll(*key, work.route.pool_id, work.route.epoch))
        if not work.is_last:
            return None
        total = sum(
            rank.memory.total(block.block_id, positions_of(block.logical, end))
            for rank in self.ranks
            for block in work.blocks
            if block.cp_rank == rank.identity.cp_rank
        )
        return SampledToken(work.request_id, work.attempt, token_of(total))

    def _states_of(self, work: ChunkWork) -> list[int]:
        """The chunk's. They are those of the prompt: KV alone does not tell them."""
        prompt = self._prompts[work.request_id, work.attempt]
        return states(prompt[: work.start + len(work.token_ids)])[work.start :]

    @staticmethod
    def _announce(
        rank: Rank, work: ChunkWork, chunk: int, layers: range, blocks: Sequence[PlacedBlock]
    ) -> None:
        if work.route is None or not blocks:
            return
        command = AnnounceBlocks(
            work.request_id,
            work.attempt,
            work.route.pool_id,
            work.route.epoch,
            chunk,
            layers.start,
            layers.stop,
            tuple(block.logical for block in blocks),
            tuple(ref_of(block) for block in blocks),
        )
        rank.command(command)

    def check(self) -> None:
        self._scheduler.check()

    def counts(self) -> Sequence[BlockCounts]:
        return self._scheduler.load().blocks


def positions_of(logical: int, end: int) -> range:
    return range(logical * BLOCK_SIZE, min((logical + 1) * BLOCK_SIZE, end))


def _ignore(event: Event) -> None:
    """A follower's main thread has nothing to decide."""
