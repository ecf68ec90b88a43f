"""A gang: its ranks, and its leader on virtual time around a real node."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic

from bench.simulation.leader import VirtualLeader
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
from engine.leader_node import LeaderNode, P
from kvtransfer.events import Command, ControlReceived, Event, SendControl
from kvtransfer.identity import RankIdentity
from prefill.announcer import Announcer
from prefill.facts import PoolFacts
from prefill.manifest import layer_groups
from prefill.placement import Geometry
from prefill.scheduler import PrefillScheduler
from protocol.messages import Prefill, ToCoordinator
from protocol.plans import ChunkWork, PrefillPlan, SampledToken, StepResult

FINGERPRINT = "simulated"
MAX_MODEL_LEN = 200
CHUNK_TOKENS = 12
TURN_S = 0.0001
STEP_S = 0.01
FETCH_TIMEOUT_S = 3.0
Key = tuple[str, int]


class Gang(VirtualLeader[P], Generic[P]):
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
        self._tell = tell
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
        super().__init__(world, self._make_node(world), TURN_S)

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

    def _step_s(self, plan: P) -> float:
        del plan
        return self.world.delay(STEP_S)

    def _end(self, plan: P) -> None:
        super()._end(plan)
        self.node.check()

    def _do(self, command: Command) -> None:
        if isinstance(command, SendControl):
            self._tell(command.message)
        else:
            self.ranks[0].command(command)

    @abstractmethod
    def _make_node(self, world: World) -> LeaderNode[P]:
        """Who decides; the ranks are there."""


class FlatCosts:
    """A token costs a millisecond, on any ring."""

    def seconds(self, new: int, cached: int, ring_size: int) -> float:
        return 0.001 * (new + cached / 8) / ring_size

    def prefers_pass_q(self, new: int, cached: int, ring_size: int) -> bool:
        return ring_size > 1 and cached > 4 * new

    def worth_taking(self, new: int, cached: int, ring_sizes: Sequence[int]) -> Sequence[int]:
        return ring_sizes if new + cached > CHUNK_TOKENS else ring_sizes[:1]


class PrefillGang(Gang[PrefillPlan]):
    """A prefill pool."""

    def _make_node(self, world: World) -> PrefillScheduler:
        del world
        spec, groups = self.spec, layer_groups(NUM_LAYERS, 1)
        self._prompts: dict[Key, tuple[int, ...]] = {}
        self._announcers = [
            Announcer(
                rank.command,
                cp_rank=rank.identity.cp_rank,
                block_size=BLOCK_SIZE,
                groups=groups,
            )
            for rank in self.ranks
        ]
        facts = PoolFacts(
            pool_id=spec.pool_id,
            geometry=Geometry(spec.cp_size, BLOCK_SIZE, CHUNK_TOKENS),
            tp_size=spec.tp_size,
            num_blocks=self.ranks[0].memory.layout.num_blocks,
            layer_groups=groups,
            model_fingerprint=FINGERPRINT,
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
            max_num_sequences=4,
            step_target_s=0.02,
            fetch_timeout_s=FETCH_TIMEOUT_S,
        )
        return PrefillScheduler(facts, FlatCosts())

    def on_event(self, event: Event) -> None:
        match event:
            case ControlReceived(Prefill() as message):
                self._prompts[message.request_id, message.attempt] = message.prompt_token_ids
        super().on_event(event)

    def _execute(self, plan: PrefillPlan) -> list[StepResult]:
        tokens = [token for work in plan.work if (token := self._compute(work)) is not None]
        return [StepResult(plan.step, 0, tuple(tokens))]

    def _compute(self, work: ChunkWork) -> SampledToken | None:
        end = work.start + len(work.token_ids)
        for rank, announcer in zip(self.ranks, self._announcers, strict=True):
            if rank.identity.cp_rank in work.ring:
                announcer.cached(work)
                on_layer_done = announcer.layer_callback(work)
                for layer in range(NUM_LAYERS):
                    self._write(rank, layer, work)
                    if on_layer_done is not None:
                        on_layer_done(layer)
            announcer.chunk_done(work)
        if not work.is_last:
            return None
        total = sum(
            rank.memory.total(block.block_id, positions_of(block.logical, end))
            for rank in self.ranks
            for block in work.blocks
            if block.cp_rank == rank.identity.cp_rank
        )
        return SampledToken(work.request_id, work.attempt, token_of(total))

    def _write(self, rank: Rank, layer: int, work: ChunkWork) -> None:
        """The chunk's blocks that lie on a rank."""
        for position, state in enumerate(self._states_of(work), work.start):
            block = work.blocks[position // BLOCK_SIZE]
            if block.cp_rank == rank.identity.cp_rank:
                rank.memory.write(range(layer, layer + 1), block.block_id, position, state)

    def _states_of(self, work: ChunkWork) -> list[int]:
        """The chunk's. They are those of the prompt: KV alone does not tell them."""
        prompt = self._prompts[work.request_id, work.attempt]
        return states(prompt[: work.start + len(work.token_ids)])[work.start :]


def positions_of(logical: int, end: int) -> range:
    return range(logical * BLOCK_SIZE, min((logical + 1) * BLOCK_SIZE, end))


def _ignore(event: Event) -> None:
    """A follower's main thread has nothing to decide."""
