"""A prefill gang: executes the real node's plans over the simulated memories."""

from collections.abc import Sequence
from functools import partial

from bench.simulate.ranks import Rank
from kvcache.blocks import BlockPool
from kvtransfer.events import ControlReceived, Event
from prefill.announcer import Announcer
from prefill.facts import PrefillFacts
from prefill.manifest import layer_groups
from prefill.placement import Geometry
from prefill.scheduler import PrefillScheduler
from protocol.messages import Prefill
from protocol.plans import ChunkWork, PrefillPlan, SampledToken, StepResult
from tests.simulation.gangs import FINGERPRINT, MAX_MODEL_LEN, CheckedGang, Key
from tests.simulation.model import (
    BLOCK_SIZE,
    NUM_LAYERS,
    VOCAB_SIZE,
    positions_of,
    states,
    token_of,
    total,
    write,
)

CHUNK_TOKENS = 12
FETCH_TIMEOUT_S = 3.0


class FlatCosts:
    """A token costs a millisecond, on any ring."""

    def seconds(self, new: int, cached: int, ring_size: int) -> float:
        return 0.001 * (new + cached / 8) / ring_size

    def prefers_pass_q(self, new: int, cached: int, ring_size: int) -> bool:
        return ring_size > 1 and cached > 4 * new

    def worth_taking(self, new: int, cached: int, ring_sizes: Sequence[int]) -> Sequence[int]:
        return ring_sizes if new + cached > CHUNK_TOKENS else ring_sizes[:1]


class PrefillGang(CheckedGang[PrefillPlan]):
    """A prefill pool."""

    def _make_node(self) -> PrefillScheduler:
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
        facts = PrefillFacts(
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
        spaces = [BlockPool(facts.num_blocks, BLOCK_SIZE) for _ in range(spec.cp_size)]
        return PrefillScheduler(facts, spaces, FlatCosts())

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
            announcer.play(work, partial(self._write, rank, work))
        if not work.is_last:
            return None
        found = sum(
            total(rank.memory, block.block_id, positions_of(block.logical, end))
            for rank in self.ranks
            for block in work.blocks
            if block.cp_rank == rank.identity.cp_rank
        )
        return SampledToken(work.request_id, work.attempt, token_of(found))

    def _write(self, rank: Rank, work: ChunkWork, layer: int) -> None:
        """The chunk's blocks that lie on a rank."""
        for position, state in enumerate(self._states_of(work), work.start):
            block = work.blocks[position // BLOCK_SIZE]
            if block.cp_rank == rank.identity.cp_rank:
                write(rank.memory, range(layer, layer + 1), block.block_id, position, state)

    def _states_of(self, work: ChunkWork) -> list[int]:
        """The chunk's. They are those of the prompt: KV alone does not tell them."""
        prompt = self._prompts[work.request_id, work.attempt]
        return states(prompt[: work.start + len(work.token_ids)])[work.start :]
