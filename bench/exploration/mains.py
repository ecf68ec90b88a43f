"""A leader's main thread around a real scheduler, with steps that others may overtake.

1. Events come one by one. Between them, whatever the scheduler wants to compute begins at once.
2. While a step is under way, events wait; the ranks' transfer threads do not.
3. The step can end as soon as every rank has computed its part, and at any later time.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

from bench.exploration.inputs import Compute, Computed, Message, Option, Outbox, StepEnds
from bench.exploration.memory import BLOCK_SIZE, tag
from decode.batch import SchedulerLimits
from decode.scheduler import DecodeScheduler
from decode.sequence import Sequence as Decoding
from decode.states import State as DecodeState
from kvcache.blocks import BlockPool
from kvtransfer.events import AnnounceBlocks, AnnouncedAll, Command, Event, SendControl
from prefill.blocks import ref_of
from prefill.facts import PoolFacts
from prefill.manifest import CACHED_CHUNK, cached_blocks, moving_blocks
from prefill.request import Request
from prefill.scheduler import PrefillScheduler
from prefill.states import State as PrefillState
from protocol.kv import BlockRef
from protocol.messages import Released
from protocol.plans import ChunkWork, DecodePlan, PlacedBlock, PrefillPlan, SampledToken, StepResult

P = TypeVar("P")
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
    """

    def __init__(self, name: str, ranks: tuple[str, ...]) -> None:
        self.name = name
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
        self._obey(self._end(plan))
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
            plan, commands = self._schedule()
            self._obey(commands)
            if plan is not None:
                self._plan = plan
                self._begin(plan)
            elif self._events:
                self._obey(self._on_event(self._events.popleft()))
            else:
                break
        self.check()

    def _obey(self, commands: Sequence[Command]) -> None:
        for command in commands:
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
        return self._plan is None and not self._events and self.num_held == 0

    @abstractmethod
    def _on_event(self, event: Event) -> Sequence[Command]:
        """Hand it to the scheduler."""

    @abstractmethod
    def _schedule(self) -> tuple[P | None, Sequence[Command]]:
        """What the scheduler wants to do next."""

    @abstractmethod
    def _begin(self, plan: P) -> None:
        """Have the ranks execute it."""

    @abstractmethod
    def _end(self, plan: P) -> Sequence[Command]:
        """Tell the scheduler what came of it."""

    @abstractmethod
    def check(self) -> None:
        """Assert that every block is accounted for."""

    @abstractmethod
    def holds(self, key: tuple[str, int]) -> bool:
        """Whether any block is held for an attempt."""

    @property
    @abstractmethod
    def num_held(self) -> int:
        """Attempts for which anything is held."""

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

    def __init__(self, name: str, ranks: tuple[str, ...], facts: PoolFacts) -> None:
        super().__init__(name, ranks)
        self._facts = facts
        self._scheduler = PrefillScheduler(facts, WholeRing())

    def _on_event(self, event: Event) -> Sequence[Command]:
        return self._scheduler.on_event(event, 0.0)

    def _schedule(self) -> tuple[PrefillPlan | None, Sequence[Command]]:
        plan = self._scheduler.schedule(0.0)
        return plan, self._scheduler.take_commands()

    def _begin(self, plan: PrefillPlan) -> None:
        for rank in range(len(self._ranks)):
            cp_rank = rank // self._facts.tp_size
            self._compute(rank, [block for work in plan.work for block in _new(work, cp_rank)])
            for work in plan.work:
                self._announce(rank, cp_rank, work)

    def _announce(self, rank: int, cp_rank: int, work: ChunkWork) -> None:
        """What the runner of that rank submits, in its order."""
        route = work.route
        if route is None:
            return
        groups = self._facts.layer_groups
        parts: list[tuple[int, range, list[PlacedBlock]]] = []
        if cp_rank in work.ring:
            all_layers = range(groups[0].start, groups[-1].stop)
            parts.append((CACHED_CHUNK, all_layers, cached_blocks(work, cp_rank)))
            moving = moving_blocks(work, cp_rank, BLOCK_SIZE)
            parts += [(work.chunk, group, moving) for group in groups]
        key = (work.request_id, work.attempt)
        for chunk, layers, blocks in parts:
            if blocks:
                command = AnnounceBlocks(
                    *key, route.pool_id, route.epoch, chunk, layers.start, layers.stop,
                    tuple(block.logical for block in blocks),
                    tuple(ref_of(block) for block in blocks),
                )  # fmt: skip
                self._submit(rank, command)
        if work.is_last:
            self._submit(rank, AnnouncedAll(*key, route.pool_id, route.epoch))

    def _end(self, plan: PrefillPlan) -> Sequence[Command]:
        tokens = tuple(
            SampledToken(work.request_id, work.attempt, next_token(work.token_ids))
            for work in plan.work
            if work.is_last
        )
        return self._scheduler.update(plan, [StepResult(0, 0, tokens)], 0.0)

    def check(self) -> None:
        self._scheduler.check()

    def holds(self, key: tuple[str, int]) -> bool:
        return key in self._scheduler._requests

    @property
    def num_held(self) -> int:
        return len(self._scheduler._requests)

    def spaces(self) -> Sequence[BlockPool]:
        return self._scheduler._memory._blocks._spaces

    def computed_with(self) -> list[tuple[str, int]]:
        return [request.key for request in self._admitted()]

    def _admitted(self) -> list[Request]:
        states = (PrefillState.RUNNING, PrefillState.HANDING_OVER)
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
        self, name: str, ranks: tuple[str, ...], pool: BlockPool, limits: SchedulerLimits
    ) -> None:
        super().__init__(name, ranks)
        self._blocks = pool
        self._scheduler = DecodeScheduler(pool, limits, FINGERPRINT)

    def _on_event(self, event: Event) -> Sequence[Command]:
        self._scheduler.on_event(event, 0.0)
        return self._scheduler.take_commands()

    def _schedule(self) -> tuple[DecodePlan | None, Sequence[Command]]:
        plan = self._scheduler.schedule(0.0)
        return plan, self._scheduler.take_commands()

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

    def _end(self, plan: DecodePlan) -> Sequence[Command]:
        tokens = [
            SampledToken(*sequence.key, next_token(sequence.tokens(0, sequence.num_tokens)))
            for sequence in self._scheduler.sampled(plan)
        ]
        self._scheduler.update(plan, tokens, 0.0)
        return self._scheduler.take_commands()

    def check(self) -> None:
        self._blocks.check()

    def holds(self, key: tuple[str, int]) -> bool:
        return key in self._scheduler._sequences or key in self._scheduler._serving

    @property
    def num_held(self) -> int:
        return len(self._scheduler._sequences) + len(self._scheduler._serving)

    def spaces(self) -> Sequence[BlockPool]:
        return [self._blocks]

    def computed_with(self) -> list[tuple[str, int]]:
        return [sequence.key for sequence in self._running()]

    def _running(self) -> list[Decoding]:
        sequences = self._scheduler._sequences.values()
        return [s for s in sequences if s.state is DecodeState.RUNNING]

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
