"""A decode gang: executes the real node's plans over the simulated memories."""

from decode.facts import DecodeFacts
from decode.scheduler import DecodeScheduler
from kvcache.blocks import BlockPool
from kvtransfer.events import ControlReceived, Event
from protocol.messages import Reserve
from protocol.plans import DecodePlan, SampledToken, SequenceStep, StepResult, SwapBlocks
from tests.simulation.gangs import FINGERPRINT, MAX_MODEL_LEN, CheckedGang, Key
from tests.simulation.model import (
    BLOCK_SIZE,
    NUM_LAYERS,
    positions_of,
    states,
    token_of,
    total,
    write,
)


class DecodeGang(CheckedGang[DecodePlan]):
    """A decode pool."""

    def _make_node(self) -> DecodeScheduler:
        self._tokens: dict[Key, list[int]] = {}  # of each sequence, as far as they are known
        self._tables: dict[Key, list[int]] = {}
        self._host: dict[Key, list[list[list[bytes]]]] = {}
        blocks = BlockPool(self.ranks[0].memory.layout.num_blocks, BLOCK_SIZE)
        facts = DecodeFacts(
            model_fingerprint=FINGERPRINT,
            max_model_len=MAX_MODEL_LEN,
            token_budget=24,
            max_num_sequences=8,
            load_part_blocks=3,
        )
        return DecodeScheduler(facts, blocks)

    def on_event(self, event: Event) -> None:
        match event:
            case ControlReceived(Reserve() as message):
                key = (message.request_id, message.attempt)
                self._tokens.setdefault(key, list(message.prompt_token_ids))
        super().on_event(event)

    def _execute(self, plan: DecodePlan) -> list[StepResult]:
        for swap in plan.swaps:
            self._swap(swap)
        for key in plan.dropped:
            self._tables.pop(key, None)
            self._host.pop(key, None)
        for new in plan.new:
            self._tables[new.request_id, new.attempt] = list(new.block_ids)
        tokens = [token for step in plan.sequences if (token := self._compute(step)) is not None]
        return [StepResult(plan.step, 0, tuple(tokens))]

    def _swap(self, swap: SwapBlocks) -> None:
        key = (swap.request_id, swap.attempt)
        if swap.out:
            self._tables.pop(key, None)
            self._host[key] = [
                [rank.memory.save(block) for block in swap.block_ids] for rank in self.ranks
            ]
            return
        for rank, saved in zip(self.ranks, self._host.pop(key), strict=True):
            for block, parts in zip(swap.block_ids, saved, strict=True):
                rank.memory.restore(block, parts)

    def _compute(self, step: SequenceStep) -> SampledToken | None:
        key = (step.request_id, step.attempt)
        table, tokens = self._tables[key], self._tokens[key]
        table += step.new_block_ids
        end = step.start + len(step.token_ids)
        assert step.start <= len(tokens), "computed behind a gap"
        tokens[step.start : end] = step.token_ids
        for position, state in list(enumerate(states(tokens[:end])))[step.start :]:
            for rank in self.ranks:
                block = table[position // BLOCK_SIZE]
                write(rank.memory, range(NUM_LAYERS), block, position, state)
        if not step.sample:
            return None
        found = sum(
            total(rank.memory, block, positions_of(logical, end))
            for rank in self.ranks
            for logical, block in enumerate(table[: -(-end // BLOCK_SIZE)])
        )
        return SampledToken(*key, token_of(found))
