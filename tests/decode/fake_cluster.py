"""A decode pool's surroundings in memory: ranks that check every KV slot, a coordinator, a peer.

The fake KV of a token is ``(position, token_id)`` and the next token is a function of *all* KV that
a sequence sees, so a swapped, missing or stale block gives a wrong token.
"""

from typing import Any

from decode.facts import DecodeFacts
from decode.scheduler import DecodeScheduler
from decode.sequence import Sequence
from kvcache.blocks import BlockPool
from kvtransfer.events import (
    CloseSource,
    CloseTarget,
    ControlReceived,
    Event,
    HandoffBroken,
    OpenTargetBlocks,
    SendControl,
    SourceClosed,
    TargetClosed,
    TargetCommitted,
    TargetIsOpen,
)
from protocol.handoff import Fetch, FetchRefused, Serve
from protocol.kv import BlockRef
from protocol.messages import (
    Abort,
    Ask,
    CacheUpdate,
    Committed,
    ComputeHere,
    NewToken,
    Released,
    RequestFailed,
    Reserve,
    Ticket,
    ToCoordinator,
    Tokens,
)
from protocol.plans import (
    DecodePlan,
    FailedRow,
    RowResult,
    SampledToken,
    SequenceStep,
    StepResult,
)
from protocol.request import FinishReason, NoToken, SamplingParams, TransferStats

Key = tuple[str, int]
VOCAB_SIZE = 50


def next_token(kv: list[tuple[int, int]]) -> int:
    return hash(tuple(kv)) % VOCAB_SIZE


def reference(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """What a sequence generates when nothing goes wrong."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(list(enumerate(tokens))))
    return tokens[len(prompt) :]


NAN = -7  # in place of a token: the KV of this slot is not finite


class FakeRank:
    """Executes plans over a memory in which every slot says what was written there."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.is_broken = False  # what it computes is not finite
        self.slots: dict[tuple[int, int], tuple[int, int]] = {}
        self.tables: dict[Key, list[int]] = {}
        self.host: dict[Key, list[dict[int, tuple[int, int]]]] = {}

    def write(self, block_id: int, offset: int, value: tuple[int, int]) -> None:
        self.slots[block_id, offset] = value

    def land(self, prompt: tuple[int, ...], first_logical: int, blocks: list[BlockRef]) -> None:
        """What a hand-off of the prompt's KV into these blocks leaves there."""
        size = self.block_size
        for logical, block in enumerate(blocks, first_logical):
            for position in range(logical * size, min((logical + 1) * size, len(prompt))):
                self.write(block.block_id, position % size, (position, prompt[position]))

    def assert_holds(
        self, prompt: tuple[int, ...], first_logical: int, blocks: list[BlockRef]
    ) -> None:
        """These blocks still hold the prompt's KV."""
        size = self.block_size
        for logical, block in enumerate(blocks, first_logical):
            for position in range(logical * size, (logical + 1) * size):
                held = self.slots[block.block_id, position % size]
                assert held == (position, prompt[position]), "a block was reused while it was read"

    def spoil(self, block: BlockRef) -> None:
        for offset in range(self.block_size):
            self.write(block.block_id, offset, (-1, -1))

    @property
    def num_known(self) -> int:
        return len(self.tables) + len(self.host)

    def _block(self, block_id: int) -> dict[int, tuple[int, int]]:
        offsets = range(self.block_size)
        return {o: self.slots[block_id, o] for o in offsets if (block_id, o) in self.slots}

    def execute(self, plan: DecodePlan, _: list[Sequence]) -> list[RowResult]:
        for swap in plan.swaps:
            key = (swap.request_id, swap.attempt)
            if swap.out:
                self.tables.pop(key, None)
                self.host[key] = [self._block(block_id) for block_id in swap.block_ids]
            else:
                for block_id, saved in zip(swap.block_ids, self.host.pop(key), strict=True):
                    for offset, value in saved.items():
                        self.write(block_id, offset, value)
        for key in plan.dropped:
            held = [self.tables.pop(key, None), self.host.pop(key, None)]
            assert held != [None, None], "dropped and not known"
        for new in plan.new:
            key = (new.request_id, new.attempt)
            assert key not in self.tables
            self.tables[key] = list(new.block_ids)
        return [token for step in plan.sequences if (token := self._step(step)) is not None]

    def _step(self, step: SequenceStep) -> RowResult | None:
        table = self.tables[step.request_id, step.attempt]
        table += step.new_block_ids
        end = step.start + len(step.token_ids)
        assert step.token_ids
        for position, token_id in enumerate(step.token_ids, step.start):
            block_id, offset = table[position // self.block_size], position % self.block_size
            self.write(block_id, offset, (position, NAN if self.is_broken else token_id))
        kv = [self.slots[table[p // self.block_size], p % self.block_size] for p in range(end)]
        assert [position for position, _ in kv] == list(range(end)), "a stale or foreign slot"
        if any(token_id == NAN for _, token_id in kv):
            return FailedRow(step.request_id, step.attempt, NoToken.NON_FINITE)
        if not step.sample:
            return None
        return SampledToken(step.request_id, step.attempt, next_token(kv))


class Cluster:
    """Plays the coordinator, the transfer thread and the source of every hand-off."""

    def __init__(self, pool: BlockPool, facts: DecodeFacts, rank: Any, expected: Any) -> None:
        self.pool = pool
        self.expected = expected
        self.scheduler = DecodeScheduler(facts, self.pool)
        self.rank = rank
        self.facts = facts
        self.now = 0.0
        self.requests: dict[Key, Reserve] = {}
        self.opened: dict[Key, OpenTargetBlocks] = {}  # hand-offs that can receive bytes
        self.is_open: set[Key] = set()
        self.closing: set[Key] = set()
        self.served: dict[Key, Serve] = {}  # fetches whose blocks may be read from
        self.closing_served: set[Key] = set()
        self.refused: dict[Key, str] = {}
        self.asked: dict[Key, Fetch] = {}  # of a store
        self.tickets: dict[Key, int] = {}
        self.committed: set[Key] = set()
        self.outputs: dict[Key, list[int]] = {}
        self.finished: dict[Key, FinishReason | None] = {}
        self.failed: dict[Key, str] = {}
        self.num_released: dict[Key, int] = {}
        self.cached_hashes: set[bytes] = set()
        self.log: list[str] = []

    # -- what the coordinator says

    def reserve(
        self, request_id: str, prompt: tuple[int, ...], max_tokens: int, **sampling: Any
    ) -> Key:
        params = SamplingParams(max_tokens=max_tokens, **sampling)
        message = Reserve(request_id, 0, prompt, params)
        self.requests[request_id, 0] = message
        self._tell(ControlReceived(message))
        return request_id, 0

    def reserve_stored(
        self, request_id: str, prompt: tuple[int, ...], max_tokens: int, num_store_tokens: int
    ) -> Key:
        """A request of whose prompt a store has a prefix."""
        params = SamplingParams(max_tokens=max_tokens)
        message = Reserve(
            request_id,
            0,
            prompt,
            params,
            store_pool_id="store0",
            store_epoch=5,
            num_store_tokens=num_store_tokens,
        )
        self.requests[request_id, 0] = message
        self._tell(ControlReceived(message))
        return request_id, 0

    def bring(self, key: Key, number: int) -> None:
        """A piece of what a store has arrives: opened, asked for and committed."""
        piece = (f"{key[0]}~{number}", key[1])
        self._tell(TargetIsOpen(*piece))
        asked = self.asked.pop(piece)
        command = self.opened.pop(piece)
        assert asked.first_logical == command.first_logical
        assert (asked.source_pool_id, asked.source_epoch) == ("store0", 5)
        assert len(asked.block_hashes) == len(asked.owners) == len(command.blocks)
        self.rank.land(self.requests[key].prompt_token_ids, command.first_logical, command.blocks)
        num_tokens = (command.first_logical + len(command.blocks)) * self.pool.block_size
        self._tell(TargetCommitted(*piece, num_tokens, 0, TransferStats()))

    def retry(self, key: Key, num_output_tokens: int | None = None) -> Key:
        """The next attempt, of which the caller has that many tokens, or all that were made."""
        before = self.requests[key]
        tokens = self.outputs.get(key, [])[:num_output_tokens]
        message = Reserve(
            key[0],
            key[1] + 1,
            (*before.prompt_token_ids, *tokens),
            before.sampling,
            num_output_tokens=before.num_output_tokens + len(tokens),
        )
        key = (message.request_id, message.attempt)
        self.requests[key] = message
        self._tell(ControlReceived(message))
        return key

    def ask(self, key: Key) -> None:
        self._tell(ControlReceived(Ask(*key)))

    def compute_here(self, key: Key) -> None:
        self._tell(ControlReceived(ComputeHere(*key)))

    def abort(self, key: Key) -> None:
        self._tell(ControlReceived(Abort(*key)))

    # -- what the transfer thread says

    def open(self, key: Key) -> None:
        self.is_open.add(key)
        self._tell(TargetIsOpen(*key))

    def commit(self, key: Key) -> None:
        """Every byte lands, the hand-off commits and is closed by that."""
        command, prompt = self.opened.pop(key), self.requests[key].prompt_token_ids
        self.rank.land(prompt, command.first_logical, list(command.blocks))
        first = self.expected(prompt, 1)[0]
        self.committed.add(key)
        self.outputs[key] = [first]
        self._tell(TargetCommitted(*key, len(prompt), first, TransferStats(num_bytes=1)))

    def land_garbage(self, key: Key) -> None:
        for block in self.opened[key].blocks:
            self.rank.spoil(block)

    def close(self, key: Key, num_whole_blocks: int = 0) -> None:
        """Nothing lands any more; so many leading blocks have arrived."""
        self.closing.discard(key)
        command = self.opened.pop(key, None)
        if command is not None and num_whole_blocks:
            whole = list(command.blocks[:num_whole_blocks])
            self.rank.land(self.requests[key].prompt_token_ids, command.first_logical, whole)
        self._tell(TargetClosed(*key, num_whole_blocks))

    def break_handoff(self, key: Key) -> None:
        self._tell(HandoffBroken(*key, "target", "the source died"))

    def fetch(self, key: Key, first_logical: int, end_logical: int) -> None:
        """The prefill pool misses these blocks."""
        owners = tuple(logical % 2 for logical in range(first_logical, end_logical))
        self._tell(
            Fetch(
                *key,
                source_pool_id="decode0",
                source_epoch=5,
                first_logical=first_logical,
                owners=owners,
                target_pool_id="prefill0",
                target_epoch=3,
            )
        )

    def end_serving(self, key: Key, *, committed: bool) -> None:
        """It has read what it was served, or will not; what it can have read was right."""
        command = self.served.pop(key)
        self.closing_served.discard(key)
        prompt = self.requests[key].prompt_token_ids
        self.rank.assert_holds(prompt, command.first_logical, list(command.blocks))
        self._tell(SourceClosed(*key, committed))

    def break_serving(self, key: Key) -> None:
        self._tell(HandoffBroken(*key, "source", "the target has closed it"))

    # -- the loop

    def _tell(self, event: Event) -> None:
        self.scheduler.on_event(event, self.now)
        self.pool.check()
        self._obey()

    def step(self) -> DecodePlan | None:
        self.now += 1.0
        plan = self.scheduler.schedule(self.now)
        self._obey()
        self.pool.check()
        if plan is not None:
            self._check(plan)
            rows = self.rank.execute(plan, self.scheduler.sampled(plan))
            self.scheduler.update(plan, [StepResult.of(plan.step, 0, rows, 0.0)], self.now)
            self.pool.check()
            self._obey()
        return plan

    def _check(self, plan: DecodePlan) -> None:
        assert sum(len(s.token_ids) for s in plan.sequences) <= self.facts.token_budget
        assert len(plan.sequences) <= self.facts.max_num_sequences
        keys = [(step.request_id, step.attempt) for step in plan.sequences]
        assert len(keys) == len(set(keys))

    def _obey(self) -> None:
        for command in self.scheduler.take_commands():
            match command:
                case OpenTargetBlocks():
                    self.opened[command.request_id, command.attempt] = command
                    self.log.append(f"open {command.request_id}")
                case CloseTarget():
                    self.closing.add((command.request_id, command.attempt))
                    self.log.append(f"close {command.request_id}")
                case Serve():
                    key = (command.request_id, command.attempt)
                    assert key not in self.served
                    self.served[key] = command
                case FetchRefused():
                    self.refused[command.request_id, command.attempt] = command.reason
                case CloseSource():
                    key = (command.request_id, command.attempt)
                    assert key in self.served and key not in self.closing_served
                    self.closing_served.add(key)
                case Fetch():
                    self.asked[command.request_id, command.attempt] = command
                case SendControl(message):
                    self._receive(message)

    def _receive(self, message: ToCoordinator) -> None:
        self.log.append(f"{type(message).__name__} {getattr(message, 'request_id', '')}".strip())
        match message:
            case Ticket():
                key = (message.request_id, message.attempt)
                assert self.tickets.get(key, message.num_cached_tokens) == message.num_cached_tokens
                self.tickets[key] = message.num_cached_tokens
            case Tokens():
                for token in message.tokens:
                    self._receive_token(token)
            case RequestFailed():
                self.failed[message.request_id, message.attempt] = message.code
            case Released():
                key = (message.request_id, message.attempt)
                assert key not in self.opened or key in self.closing, "bytes can still land"
                assert key not in self.served, "its blocks can still be read"
                self.num_released[key] = self.num_released.get(key, 0) + 1
            case CacheUpdate():
                self.cached_hashes.difference_update(message.evicted)
                assert not self.cached_hashes.intersection(message.stored)
                self.cached_hashes.update(message.stored)
            case Committed():
                assert (message.request_id, message.attempt) in self.committed

    def _receive_token(self, token: NewToken) -> None:
        key = (token.request_id, token.attempt)
        assert key not in self.finished and key not in self.num_released
        output = self.outputs.setdefault(key, [])
        num_earlier = self.requests[key].num_output_tokens
        assert token.index == num_earlier + len(output), "a token twice, or one missing"
        output.append(token.token_id)
        assert output == self.expected(self.requests[key].prompt_token_ids, len(output))
        if token.finish_reason is not None:
            self.finished[key] = token.finish_reason

    # -- the end

    def run(self, max_steps: int = 1000) -> None:
        """Step until there is nothing to do."""
        for _ in range(max_steps):
            if self.step() is None:
                return
        raise AssertionError("the scheduler does not come to rest")

    def assert_empty(self) -> None:
        """Nothing is held or remembered of any request."""
        assert self.scheduler.is_idle
        assert self.step() is None
        counts = self.pool.counts()
        assert counts.free + counts.cached == counts.total, counts
        assert self.rank.num_known == 0
        assert counts.cached == len(self.cached_hashes)
        load = self.scheduler.load()
        assert (load.num_waiting, load.num_running, load.pending_tokens) == (0, 0, 0)
        assert load.counters["swapped_blocks"] == 0
        assert all(count >= 1 for count in self.num_released.values())
        assert set(self.num_released) == set(self.requests)
