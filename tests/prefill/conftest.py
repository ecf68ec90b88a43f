"""A prefill pool without ranks: its scheduler, and what a right set of ranks does with its plans.

``Pool`` plays the transfer thread and the ranks. Of every plan it checks what must hold of any, and
it keeps what the ranks would announce, to be compared with the manifest.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from kvcache.blocks import BlockPool
from kvtransfer.events import (
    AnnounceBlocks,
    AnnouncedAll,
    CloseSource,
    CloseTarget,
    Command,
    CommitWhenRead,
    ControlReceived,
    Event,
    HandoffBroken,
    OpenTargetBlocks,
    PoolsChanged,
    SendControl,
    SourceClosed,
    TargetClosed,
    TargetCommitted,
    TargetIsOpen,
)
from prefill.announcer import Announcer
from prefill.facts import PrefillFacts
from prefill.manifest import layer_groups
from prefill.placement import Geometry
from prefill.scheduler import PrefillScheduler
from protocol.handoff import Fetch, SegmentKey
from protocol.kv import PoolEndpoint
from protocol.messages import Abort, Prefill, ToCoordinator
from protocol.plans import ChunkWork, PrefillPlan, SampledToken, StepResult
from protocol.request import SamplingParams, TransferStats

BLOCK_SIZE = 4
NUM_LAYERS = 6
EPOCH = 7


@dataclass(frozen=True)
class FlatCosts:
    """A token costs a millisecond; a ring divides that evenly and pays for each of its ranks."""

    ring_from: int = 64  # tokens from which rings are worth taking

    def seconds(self, new: int, cached: int, ring_size: int) -> float:
        return 0.001 * (new + cached / 8) / ring_size + 0.004 * (ring_size - 1)

    def prefers_pass_q(self, new: int, cached: int, ring_size: int) -> bool:
        return ring_size > 1 and cached > 4 * new

    def worth_taking(
        self,
        new: int,
        cached: int,  # noqa: ARG002 - the interface's, of no interest here
        ring_sizes: Sequence[int],
    ) -> Sequence[int]:
        return ring_sizes if new >= self.ring_from else ring_sizes[:1]


@dataclass
class Pool:
    """The world around a scheduler; ``now`` is its clock."""

    scheduler: PrefillScheduler
    now: float = 0.0
    messages: list[ToCoordinator] = field(default_factory=list)
    commits: dict[tuple[str, int], CommitWhenRead] = field(default_factory=dict)
    closing: list[tuple[str, int]] = field(default_factory=list)
    fetches: dict[tuple[str, int], OpenTargetBlocks] = field(default_factory=dict)  # not ended
    asked: dict[tuple[str, int], Fetch] = field(default_factory=dict)
    closing_fetch: list[tuple[str, int]] = field(default_factory=list)
    announced: dict[tuple[str, int], set[SegmentKey]] = field(default_factory=dict)
    # of each request: how often (tensor-parallel rank, layer, logical block) was announced
    sent: dict[tuple[str, int], Counter[tuple[int, int, int]]] = field(default_factory=dict)
    all_announced: dict[tuple[str, int], set[int]] = field(default_factory=dict)

    def take(self) -> None:
        for command in self.scheduler.take_commands():
            match command:
                case SendControl():
                    self.messages.append(command.message)
                case CommitWhenRead():
                    self.commits[command.request_id, command.attempt] = command
                case CloseSource():
                    self.closing.append((command.request_id, command.attempt))
                case OpenTargetBlocks():
                    assert (command.request_id, command.attempt) not in self.fetches
                    self.fetches[command.request_id, command.attempt] = command
                case Fetch():
                    self.asked[command.request_id, command.attempt] = command
                case CloseTarget():
                    assert (command.request_id, command.attempt) in self.fetches
                    self.closing_fetch.append((command.request_id, command.attempt))
                case _:
                    raise AssertionError(command)

    def add(self, message: Prefill) -> None:
        self.on_event(ControlReceived(message))

    def abort(self, request_id: str, attempt: int = 1) -> None:
        self.on_event(ControlReceived(Abort(request_id, attempt)))

    def step(self) -> PrefillPlan | None:
        """Schedule, have imaginary ranks execute the plan, update."""
        plan = self.schedule()
        if plan is not None:
            self.finish(plan)
        return plan

    def schedule(self) -> PrefillPlan | None:
        plan = self.scheduler.schedule(self.now)
        self.take()
        return plan

    def finish(self, plan: PrefillPlan) -> None:
        facts = self.scheduler.facts
        for rank in range(facts.geometry.cp_size * facts.tp_size):
            self._execute(plan, rank)
        self.now += 0.1
        tokens = tuple(
            SampledToken(work.request_id, work.attempt, 9) for work in plan.work if work.is_last
        )
        results = [StepResult(plan.step, 0), StepResult(plan.step, 1, tokens)]
        self.scheduler.update(plan, results, self.now)
        self.take()

    def _execute(self, plan: PrefillPlan, rank: int) -> None:
        facts = self.scheduler.facts
        cp_rank = rank // facts.tp_size
        for work in plan.work:
            commands: list[Command] = []
            announcer = Announcer(
                commands.append,
                cp_rank=cp_rank,
                block_size=facts.geometry.block_size,
                groups=facts.layer_groups,
            )
            announcer.play(work)
            self._keep(rank, work, commands)

    def _keep(self, rank: int, work: ChunkWork, commands: Sequence[Command]) -> None:
        key = (work.request_id, work.attempt)
        for command in commands:
            if isinstance(command, AnnouncedAll):
                self.all_announced.setdefault(key, set()).add(rank)
                continue
            assert isinstance(command, AnnounceBlocks)
            segment = SegmentKey(rank, command.chunk, command.layer_start, command.layer_end)
            announced = self.announced.setdefault(key, set())
            assert segment not in announced, "a segment is announced once"
            assert command.logical_blocks
            announced.add(segment)
            self.sent.setdefault(key, Counter()).update(
                (rank % self.scheduler.facts.tp_size, layer, logical)
                for layer in range(command.layer_start, command.layer_end)
                for logical in command.logical_blocks
            )

    def on_event(self, event: Event) -> None:
        self.scheduler.on_event(event, self.now)
        self.take()

    def open_fetch(self, request_id: str, attempt: int = 1) -> None:
        self.on_event(TargetIsOpen(request_id, attempt))

    def fetched(self, request_id: str, attempt: int = 1) -> None:
        command = self.fetches.pop((request_id, attempt))
        num_tokens = (command.first_logical + len(command.blocks)) * BLOCK_SIZE
        self.on_event(TargetCommitted(request_id, attempt, num_tokens, 0, TransferStats()))

    def break_fetch(self, request_id: str, attempt: int = 1) -> None:
        self.on_event(HandoffBroken(request_id, attempt, "target", "refused"))

    def close_fetch(self, request_id: str, attempt: int = 1) -> None:
        """Nothing lands in its blocks any more."""
        self.closing_fetch.remove((request_id, attempt))
        self.fetches.pop((request_id, attempt), None)
        self.on_event(TargetClosed(request_id, attempt))

    def close(self, request_id: str, attempt: int = 1, *, committed: bool = True) -> None:
        """What the transfer thread says when a hand-off has ended."""
        self.on_event(SourceClosed(request_id, attempt, committed))

    def set_pools(self, **epochs: int) -> None:
        pools = tuple(
            PoolEndpoint(name, "decode", epoch, 1, 1, ()) for name, epoch in epochs.items()
        )
        self.on_event(PoolsChanged(pools))

    def of(self, kind: type) -> list[ToCoordinator]:
        return [message for message in self.messages if isinstance(message, kind)]


@pytest.fixture
def make_pool() -> Callable[..., Pool]:
    def make(
        cp_size: int = 1,
        *,
        tp_size: int = 1,
        num_blocks: int = 64,
        chunk_tokens: int = 32,
        max_num_sequences: int = 64,
        ring_from: int = 64,
        step_target_s: float = 0.01,
        fetch_from: int = 1 << 30,
    ) -> Pool:
        facts = PrefillFacts(
            pool_id="prefill0",
            geometry=Geometry(cp_size, BLOCK_SIZE, chunk_tokens),
            tp_size=tp_size,
            num_blocks=num_blocks,
            layer_groups=layer_groups(NUM_LAYERS, 4),
            model_fingerprint="model",
            vocab_size=1000,
            max_model_len=4096,
            max_num_sequences=max_num_sequences,
            step_target_s=step_target_s,
            fetch_threshold_tokens=fetch_from,
        )
        spaces = [BlockPool(num_blocks, BLOCK_SIZE) for _ in range(cp_size)]
        pool = Pool(PrefillScheduler(facts, spaces, FlatCosts(ring_from)))
        pool.set_pools(decode0=EPOCH)
        return pool

    return make


@pytest.fixture
def prompt() -> Callable[..., Prefill]:
    def make(
        request_id: str,
        num_tokens: int,
        *,
        attempt: int = 1,
        num_target_tokens: int = 0,
        salt: str = "",
        first: int = 0,
        epoch: int = EPOCH,
        sampling: SamplingParams | None = None,
    ) -> Prefill:
        return Prefill(
            request_id=request_id,
            attempt=attempt,
            prompt_token_ids=tuple((first + 3 * i) % 1000 for i in range(num_tokens)),
            sampling=sampling or SamplingParams(max_tokens=8),
            target_pool_id="decode0",
            target_epoch=epoch,
            num_target_tokens=num_target_tokens,
            cache_salt=salt,
        )

    return make
