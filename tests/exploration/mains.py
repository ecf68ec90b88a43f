"""A leader's main thread around a real node, with steps that others may overtake.

1. Events come one by one. Between them, whatever the scheduler wants to compute begins at once.
2. While a step is under way, events wait; the ranks' transfer threads do not.
3. The step can end as soon as every rank has computed its part, and at any later time.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Generic

from decode.facts import DecodeFacts
from decode.scheduler import DecodeScheduler
from decode.sequence import Sequence as Decoding
from decode.states import SequenceState
from engine.leader_node import LeaderNode, P
from kvcache.blocks import BlockPool
from kvtransfer.events import Command, Event, SendControl
from prefill.announcer import Announcer
from prefill.facts import PrefillFacts
from prefill.request import Request
from prefill.scheduler import PrefillScheduler
from prefill.states import RequestState
from protocol.kv import BlockRef
from protocol.messages import Released
from protocol.plans import ChunkWork, DecodePlan, PrefillPlan, SampledToken, StepResult
from tests.exploration.inputs import Compute, Computed, Message, Option, Outbox, StepEnds
from tests.exploration.memory import BLOCK_SIZE, tag

VOCAB_SIZE = 1 << 16
MAX_MODEL_LEN = 64
FINGERPRINT = "explored"
_TOKENS_PER_REQUEST = 256  # token ids tell the request and the place


def prompt_of(request: int, num_tokens: int) -> tuple[int, ...]:
    """The token ids of a request's prompt."""
    return tuple(range(request * _TOKENS_PER_REQUEST, request * _TOKENS_PER_REQUEST + num_tokens))


def next_token(tokens: Sequence[int]) -> int:
    """What the model says next: it goes on counting."""
    return tokens[-1] + 1


def request_of(token_id: int) -> int:
    return token_id // _TOKENS_PER_REQUEST


class Main(ABC, Generic[P]):
    """One leader's main thread.

    Args:
        name: its address.
        ranks: those of its pool's ranks, the own one first.
        node: decides.
    """

    def __init__(self, name: str, ranks: tuple[str, ...], node: LeaderNode[P]) -> None:
        self.name = name
        self.node = node
        self.outbox: Outbox = []
        self._ranks = ranks
        self._events: deque[Event] = deque()
        self._plan: P | None = None
        self._computing: set[int] = set()

    def options(self) -> list[Option]:
        """What can happen here without a message."""
        return [StepEnds()] if self._plan is not None and not self._computing else []

    def take(self, option: Option, found: bytes | None) -> None:
        """Take one of its options."""
        del found
        plan, self._plan = self._plan, None
        assert option == StepEnds() and plan is not None
        self.node.update(plan, [StepResult(plan.step, 0, self._tokens(plan))], 0.0)
        self._pass_on()
        self._turn()

    def receive(self, sender: str, message: Message) -> None:
        """An event of the own transfer thread, or that a rank has computed."""
        del sender
        if isinstance(message, Computed):
            self._computing.discard(message.rank)
        else:
            assert isinstance(message, Event)
            self._events.append(message)
            self._turn()

    def _turn(self) -> None:
        while self._plan is None:
            plan = self.node.schedule(0.0)
            self._pass_on()
            if plan is not None:
                self._plan = plan
                self._begin(plan)
            elif self._events:
                self.node.on_event(self._events.popleft(), 0.0)
                self._pass_on()
            else:
                break
        self.node.check()

    def _pass_on(self) -> None:
        for command in self.node.take_commands():
            if isinstance(command, SendControl) and isinstance(command.message, Released):
                key = (command.message.request_id, command.message.attempt)
                assert not self.holds(key), f"{key} is said to be released, and is not"
            self._submit(0, command)

    def _submit(self, rank: int, command: Command | Compute) -> None:
        self.outbox.append((self.name, self._ranks[rank], command))

    def _compute(self, rank: int, blocks: Sequence[tuple[int, int]]) -> None:
        self._computing.add(rank)
        self._submit(rank, Compute(tuple(blocks)))

    @property
    def is_quiet(self) -> bool:
        return self._plan is None and not self._events and self.node.is_idle

    @abstractmethod
    def _begin(self, plan: P) -> None:
        """Have the ranks execute it."""

    @abstractmethod
    def _tokens(self, plan: P) -> tuple[SampledToken, ...]:
        """What has come of it."""

    @abstractmethod
    def holds(self, key: tuple[str, int]) -> bool:
        """Whether any block is held for an attempt."""

    @abstractmethod
    def spaces(self) -> Sequence[BlockPool]:
        """The block space of each cp rank."""

    @abstractmethod
    def computed_with(self) -> list[tuple[str, int]]:
        """Attempts whose KV is said to be here as far as it comes from elsewhere."""

    @abstractmethod
    def promised(self) -> list[tuple[int, int, int]]:
        """(cp rank, block, tag) of all KV that may be computed with from now on."""


class WholeRing:
    """Costs that make every prompt take all ranks."""

    def seconds(self, new: int, cached: int, ring_size: int) -> float:
        del new, cached, ring_size
        return 0.0

    def prefers_pass_q(self, new: int, cached: int, ring_size: int) -> bool:
        del new, cached, ring_size
        return False

    def worth_taking(self, new: int, cached: int, ring_sizes: Sequence[int]) -> Sequence[int]:
        del new, cached
        return ring_sizes[-1:]


class PrefillMain(Main[PrefillPlan]):
    """Of a prefill pool."""

    def __init__(self, name: str, ranks: tuple[str, ...], facts: PrefillFacts) -> None:
        cp_size = facts.geometry.cp_size
        self._spaces = [BlockPool(facts.num_blocks, BLOCK_SIZE) for _ in range(cp_size)]
        self._scheduler = PrefillScheduler(facts, self._spaces, WholeRing())
        super().__init__(name, ranks, self._scheduler)

    def _begin(self, plan: PrefillPlan) -> None:
        facts = self._scheduler.facts
        for rank in range(len(self._ranks)):
            cp_rank = rank // facts.tp_size
            self._compute(rank, [block for work in plan.work for block in _new(work, cp_rank)])
            announcer = Announcer(
                partial(self._submit, rank),
                cp_rank=cp_rank,
                block_size=BLOCK_SIZE,
                groups=facts.layer_groups,
            )
            for work in plan.work:
                announcer.play(work)

    def _tokens(self, plan: PrefillPlan) -> tuple[SampledToken, ...]:
        return tuple(
            SampledToken(work.request_id, work.attempt, next_token(work.token_ids))
            for work in plan.work
            if work.is_last
        )

    def holds(self, key: tuple[str, int]) -> bool:
        return key in self._scheduler._requests

    def spaces(self) -> Sequence[BlockPool]:
        return self._spaces

    def computed_with(self) -> list[tuple[str, int]]:
        return [request.key for request in self._admitted()]

    def _admitted(self) -> list[Request]:
        states = (RequestState.RUNNING, RequestState.HANDING_OVER)
        return [r for r in self._scheduler._requests.values() if r.state in states]

    def promised(self) -> list[tuple[int, int, int]]:
        """The blocks of admitted prompts, as far as they are cached, fetched or computed."""
        found = []
        for request in self._admitted():
            number = request_of(request.message.prompt_token_ids[0])
            for block in request.blocks[: -(-request.num_computed_tokens // BLOCK_SIZE)]:
                found.append((block.cp_rank, block.block_id, tag(number, block.logical)))
        return found


def _new(work: ChunkWork, cp_rank: int) -> list[tuple[int, int]]:
    """The blocks that a chunk computes on a rank, with their tags."""
    request = request_of(work.token_ids[0])
    first = work.start // BLOCK_SIZE
    mine = (block for block in work.blocks[first:] if block.cp_rank == cp_rank)
    return [(block.block_id, tag(request, block.logical)) for block in mine]


def _new_here(sequence: Decoding, start: int, num_tokens: int) -> list[tuple[int, int]]:
    """The blocks of a prompt that a decode pool fills, with their tags."""
    end = min(start + num_tokens, sequence.num_prompt_tokens)
    request = request_of(sequence.prompt_token_ids[0])
    return [
        (sequence.blocks[logical].block_id, tag(request, logical))
        for logical in range(start // BLOCK_SIZE, -(-end // BLOCK_SIZE))
    ]


class DecodeMain(Main[DecodePlan]):
    """Of a decode pool."""

    def __init__(
        self, name: str, ranks: tuple[str, ...], facts: DecodeFacts, blocks: BlockPool
    ) -> None:
        self._blocks = blocks
        self._scheduler = DecodeScheduler(facts, blocks)
        super().__init__(name, ranks, self._scheduler)

    def _begin(self, plan: DecodePlan) -> None:
        """Prompts that are computed here are written, and so is what comes from host memory.

        The KV of tokens that are generated is never moved: it is left out.
        """
        sequences = self._scheduler._sequences
        written = [
            block
            for step in plan.sequences
            for block in _new_here(
                sequences[step.request_id, step.attempt], step.start, len(step.token_ids)
            )
        ]
        for swap in plan.swaps:
            if not swap.out:
                sequence = sequences[swap.request_id, swap.attempt]
                written += _new_here(sequence, 0, len(swap.block_ids) * BLOCK_SIZE)
        if written:
            for rank in range(len(self._ranks)):
                self._compute(rank, written)

    def _tokens(self, plan: DecodePlan) -> tuple[SampledToken, ...]:
        return tuple(
            SampledToken(*sequence.key, next_token(sequence.tokens(0, sequence.num_tokens)))
            for sequence in self._scheduler.sampled(plan)
        )

    def holds(self, key: tuple[str, int]) -> bool:
        return key in self._scheduler._sequences or key in self._scheduler._exports

    def spaces(self) -> Sequence[BlockPool]:
        return [self._blocks]

    def computed_with(self) -> list[tuple[str, int]]:
        return [sequence.key for sequence in self._running()]

    def _running(self) -> list[Decoding]:
        sequences = self._scheduler._sequences.values()
        return [s for s in sequences if s.state is SequenceState.RUNNING]

    def promised(self) -> list[tuple[int, int, int]]:
        """The prompts of running sequences, as far as they are said to be computed."""
        found = []
        for sequence in self._running():
            num_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
            request = request_of(sequence.prompt_token_ids[0])
            for logical in range(-(-num_tokens // BLOCK_SIZE)):
                block: BlockRef = sequence.blocks[logical]
                found.append((0, block.block_id, tag(request, logical)))
        return found
