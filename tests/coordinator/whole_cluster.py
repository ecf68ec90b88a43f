"""The coordinator's service with real schedulers of real pools, in memory, in any order of events.

What is played here: the ranks, whose KV of a token is ``(position, token)`` and whose next token is
a function of all KV that they see; the transfer threads, block by block; the control plane, one
queue in each direction of each pool; deaths and restarts. Nothing happens but one thing at a time,
and which, the test chooses.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from coordinator.config import CoordinatorConfig, ExpectedPool
from coordinator.delivery import Delivery
from coordinator.generation import Generation
from coordinator.joining import Terms
from coordinator.losses import Patience
from coordinator.records import Record
from coordinator.registry import Registry
from coordinator.service import Service
from coordinator.slices import at_once
from decode.batch import SchedulerLimits
from decode.scheduler import DecodeScheduler
from kvcache.blocks import BlockPool
from kvcache.prefix import block_salt, hash_blocks
from kvtransfer.events import (
    AskFetch,
    CloseSource,
    CloseTarget,
    Command,
    CommitWhenRead,
    ControlReceived,
    Event,
    FetchAsked,
    HandoffBroken,
    OpenTargetBlocks,
    PoolsChanged,
    RefuseFetch,
    SendControl,
    ServeBlocks,
    SourceClosed,
    TargetClosed,
    TargetCommitted,
    TargetIsOpen,
)
from prefill.facts import PoolFacts
from prefill.manifest import cached_blocks, layer_groups, moving_blocks
from prefill.placement import Geometry
from prefill.scheduler import PrefillScheduler
from protocol.kv import KVLayout, PoolEndpoint, RankEndpoint
from protocol.messages import (
    PROTOCOL_VERSION,
    Connected,
    GangAddress,
    GangReady,
    Hello,
    ToCoordinator,
    ToRank,
)
from protocol.plans import ChunkWork, FailedRow, PrefillPlan, SampledToken, StepResult
from protocol.request import NoToken, SamplingParams, TransferStats
from tests.decode.fake_cluster import NAN, FakeRank, next_token, reference

Key = tuple[str, int]
BLOCK_SIZE = 4
FINGERPRINT = "model"
Slots = dict[tuple[int, int], tuple[int, int]]  # (block, offset) -> (position, token)


class Costs:
    """A token costs a millisecond on any ring."""

    def seconds(self, new: int, cached: int, ring_size: int) -> float:
        return 0.001 * (new + cached / 8) / ring_size

    def prefers_pass_q(self, new: int, cached: int, ring_size: int) -> bool:
        return ring_size > 1 and cached > 4 * new

    def worth_taking(self, new: int, cached: int, ring_sizes: Sequence[int]) -> Sequence[int]:
        return ring_sizes if new + cached > 24 else ring_sizes[:1]


@dataclass
class Handoff:
    """What the transfer threads of both sides know of one."""

    source: str = ""
    target: str = ""
    blocks: dict[int, tuple[int, int]] = field(default_factory=dict)  # where each is to lie
    announced: dict[int, tuple[int, int]] = field(default_factory=dict)  # (cp rank, block)
    read: set[int] = field(default_factory=set)
    commit: CommitWhenRead | None = None
    is_source_closed: bool = False
    is_target_closed: bool = False
    is_broken: bool = False


class Pool:
    """One life of a pool."""

    def __init__(self, spec: ExpectedPool, epoch: int, num_blocks: int) -> None:
        self.spec, self.epoch = spec, epoch
        self.events: deque[Event] = deque()
        self.to_coordinator: deque[ToCoordinator] = deque()
        self.memory: dict[int, Slots] = {cp: {} for cp in range(spec.cp_size)}
        self.scheduler: Any
        if spec.role == "decode":
            self.blocks = BlockPool(num_blocks, BLOCK_SIZE)
            limits = SchedulerLimits(1000, 16, 4)
            self.scheduler = DecodeScheduler(self.blocks, limits, FINGERPRINT)
            self.rank = FakeRank(BLOCK_SIZE)
            self.memory[0] = self.rank.slots
        else:
            facts = PoolFacts(
                pool_id=spec.pool_id,
                geometry=Geometry(spec.cp_size, BLOCK_SIZE, 8),
                tp_size=1,
                num_blocks=num_blocks,
                layer_groups=layer_groups(2, 1),
                model_fingerprint=FINGERPRINT,
                vocab_size=1000,
                max_model_len=1000,
                max_num_sequences=4,
                step_target_s=0.01,
            )
            self.scheduler = PrefillScheduler(facts, Costs())

    def kv(self, places: Sequence[tuple[int, int]], num_tokens: int) -> list[tuple[int, int]]:
        """What is found at the blocks ``(cp rank, block)`` of a sequence."""
        found = []
        for position in range(num_tokens):
            cp_rank, block_id = places[position // BLOCK_SIZE]
            found.append(self.memory[cp_rank][block_id, position % BLOCK_SIZE])
        assert [position for position, _ in found] == list(range(num_tokens)), "a stale slot"
        return found


class WholeCluster:
    """Everything, and ``act``s for whoever drives it.

    Args:
        pools: (pool_id, role, cp_size, num_blocks).
        in_slices: what walks over all requests is an act for each of them, among all others.
    """

    def __init__(
        self,
        pools: Sequence[tuple[str, str, int, int]],
        *,
        in_slices: bool = False,
        **config: Any,
    ) -> None:
        self.specs = {p: ExpectedPool(p, role, cp, 1) for p, role, cp, _ in pools}
        self.num_blocks = {p: count for p, _, _, count in pools}
        self.config = CoordinatorConfig(
            token="t",
            model="arithmetic",
            pools=tuple(self.specs.values()),
            block_size=BLOCK_SIZE,
            **{"local_prefill_threshold": 4, **config},
        )
        self.now = 0.0
        self.registry = Registry(
            self.config.pools,
            Terms(FINGERPRINT, BLOCK_SIZE),
            coordinator_epoch=1,
            patience=Patience(),
        )
        self.slices: deque[Iterator[None]] = deque()
        spread = self.slices.append if in_slices else at_once
        self.service = Service(self.config, self.registry, self._send, lambda: self.now, spread)
        self.pools: dict[str, Pool] = {}
        self.to_pools: dict[str, deque[ToRank]] = {}
        self.handoffs: dict[tuple[Key, bool], Handoff] = {}  # True: a fetch
        self.records: dict[str, Record] = {}
        self.deliveries: dict[str, Delivery] = {}
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.num_lives: dict[str, int] = {}
        self.dispatched: list[tuple[str, ToRank]] = []
        self.poison: tuple[int, ...] | None = None  # a prompt that kills what computes it
        self.is_read_at_once = False  # what is announced, before the step has ended
        self.broken: set[str] = set()  # pools that compute KV that is not finite
        self.broken_links: set[tuple[str, str]] = set()  # (source, target) that do so on the way
        for pool_id in self.specs:
            self.start_pool(pool_id)

    # -- the caller --------------------------------------------------------------------------------

    def submit(self, name: str, prompt: tuple[int, ...], max_tokens: int) -> None:
        """Ask for tokens.

        Raises:
            RequestError: refused.
        """
        hashes = hash_blocks(prompt, BLOCK_SIZE, block_salt(FINGERPRINT, ""))
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        generation = Generation(name, prompt, tuple(hashes), sampling, "tenant")
        delivery = Delivery()
        self.records[name] = self.service.submit(generation, delivery, 0, self.now)
        self.deliveries[name], self.prompts[name] = delivery, prompt

    def abort(self, name: str) -> None:
        self.service.abort(self.records[name])

    def tokens(self, name: str) -> list[int]:
        """What the caller has been given, checked: each token once, in order."""
        delivered = [token for _, tokens in self.deliveries[name]._arrived for token in tokens]
        assert [token.index for token in delivered] == list(range(len(delivered)))
        return [token.token_id for token in delivered]

    # -- pools -------------------------------------------------------------------------------------

    def start_pool(self, pool_id: str) -> None:
        """It comes up, for the first time or again, and serves."""
        spec = self.specs[pool_id]
        life = self.num_lives[pool_id] = self.num_lives.get(pool_id, 0) + 1
        layout = KVLayout(2, self.num_blocks[pool_id], 1, 0, 1, BLOCK_SIZE, 2, "float32")
        for rank in range(spec.num_ranks):
            endpoint = RankEndpoint(rank, rank, 0, f"{pool_id}{rank}.{life}", "", layout)
            gang = GangAddress("", "") if rank == 0 else None
            where = (spec.role, pool_id, spec.cp_size, 1, endpoint, FINGERPRINT, 1000, gang)
            hello = Hello(PROTOCOL_VERSION, *where)
            self.registry.on_hello(f"{pool_id}/{rank}/{life}", hello, self.now)
        for rank in range(spec.num_ranks):
            self.registry.on_gang_ready(f"{pool_id}/{rank}/{life}", GangReady(), self.now)
        epoch = self.registry.pools[pool_id].epoch
        self.pools[pool_id] = Pool(spec, epoch, self.num_blocks[pool_id])
        self.to_pools[pool_id] = deque()
        self._tell_pools()
        for peer in list(self.registry._peers):
            self.registry.on_connected(peer, Connected(self.registry.version), self.now)
        self.service.on_pool_serving(pool_id)

    def kill_pool(self, pool_id: str) -> None:
        """It is gone, with all that it has not said; the coordinator notices at once."""
        del self.pools[pool_id], self.to_pools[pool_id]
        self.registry.lose(pool_id, "killed")
        for (key, is_fetch), handoff in self.handoffs.items():
            if pool_id == handoff.source:
                handoff.is_source_closed = True
                self._break(key, is_fetch, handoff, "target", f"{pool_id} is gone")
            if pool_id == handoff.target:
                handoff.is_target_closed = True
                self._break(key, is_fetch, handoff, "source", f"{pool_id} is gone")
        self._tell_pools()
        self.service.on_pool_lost(pool_id)

    def _tell_pools(self) -> None:
        endpoints = tuple(
            PoolEndpoint(pool_id, pool.spec.role, pool.epoch, pool.spec.cp_size, 1, ())
            for pool_id, pool in self.pools.items()
        )
        for pool in self.pools.values():
            pool.events.append(PoolsChanged(endpoints))

    def _send(self, pool_id: str, message: ToRank) -> None:
        if pool_id in self.to_pools:
            self.to_pools[pool_id].append(message)

    def deliver_to_pool(self, pool_id: str) -> None:
        message = self.to_pools[pool_id].popleft()
        self.dispatched.append((pool_id, message))
        self.pools[pool_id].events.append(ControlReceived(message))

    def deliver_to_coordinator(self, pool_id: str) -> None:
        self.service.on_message(pool_id, self.pools[pool_id].to_coordinator.popleft())

    def sweep(self, seconds: float = 1.0) -> list[tuple[str, str]]:
        self.now += seconds
        return self.service.sweep(self.now)

    # -- a step ------------------------------------------------------------------------------------

    def step(self, pool_id: str) -> bool:
        """The leader takes in its events and has a step executed; whether there was anything."""
        pool = self.pools[pool_id]
        is_idle = not pool.events
        while pool.events:
            event = pool.events.popleft()
            if pool.spec.role == "decode":
                pool.scheduler.on_event(event, self.now)
                self._obey(pool_id, pool.scheduler.take_commands())
            else:
                self._obey(pool_id, pool.scheduler.on_event(event, self.now))
        plan = pool.scheduler.schedule(self.now)
        self._obey(pool_id, pool.scheduler.take_commands())
        if plan is None:
            return not is_idle
        if pool.spec.role == "decode":
            sampled = pool.scheduler.sampled(plan)
            keys = {(s.request_id, s.attempt) for s in plan.sequences}
            if self._is_poisoned(pool_id, {key[0] for key in keys}):
                return True
            pool.rank.is_broken = pool_id in self.broken
            tokens = pool.rank.execute(plan, sampled)
            pool.scheduler.update(plan, tokens, self.now)
            self._obey(pool_id, pool.scheduler.take_commands())
            pool.blocks.check()
        else:
            if self._is_poisoned(pool_id, {work.request_id for work in plan.work}):
                return True
            self._prefill(pool_id, plan)
            pool.scheduler.check()
        return True

    def _is_poisoned(self, pool_id: str, names: set[str]) -> bool:
        if not any(self.prompts.get(name) == self.poison for name in names):
            return False
        pool = self.pools[pool_id]
        while pool.to_coordinator:  # it had been sent before the step
            self.deliver_to_coordinator(pool_id)
        self.kill_pool(pool_id)
        return True

    def _prefill(self, pool_id: str, plan: PrefillPlan) -> None:
        pool = self.pools[pool_id]
        tokens, failed = [], []
        for work in plan.work:
            for position, token_id in enumerate(work.token_ids, work.start):
                block = work.blocks[position // BLOCK_SIZE]
                slot = (block.block_id, position % BLOCK_SIZE)
                value = NAN if pool_id in self.broken else token_id
                pool.memory[block.cp_rank][slot] = (position, value)
            self._announce(pool, work)
            if self.is_read_at_once:
                self._read_all((work.request_id, work.attempt))
            places = [(block.cp_rank, block.block_id) for block in work.blocks]
            kv = pool.kv(places, work.start + len(work.token_ids))
            if any(token_id == NAN for _, token_id in kv):
                failed.append(FailedRow(work.request_id, work.attempt, NoToken.NON_FINITE))
            elif work.is_last:
                tokens.append(SampledToken(work.request_id, work.attempt, next_token(kv)))
        results = [StepResult(plan.step, 0, tuple(tokens), failed=tuple(failed))]
        self._obey(pool_id, pool.scheduler.update(plan, results, self.now))

    def _read_all(self, key: Key) -> None:
        handoff = self.handoffs.get((key, False))
        while handoff is not None and handoff.commit is None and self._can_move(handoff):
            if handoff.read == handoff.announced.keys():
                return
            self.move((key, False))

    def _announce(self, pool: Pool, work: ChunkWork) -> None:
        handoff = self.handoffs.get(((work.request_id, work.attempt), False))
        if handoff is None or work.route is None or handoff.is_source_closed:
            return
        handoff.source = pool.spec.pool_id
        for cp_rank in range(pool.spec.cp_size):
            for block in (
                *cached_blocks(work, cp_rank),
                *moving_blocks(work, cp_rank, BLOCK_SIZE),
            ):
                assert block.logical not in handoff.announced
                handoff.announced[block.logical] = (cp_rank, block.block_id)

    # -- the transfer threads ----------------------------------------------------------------------

    def _obey(self, pool_id: str, commands: Sequence[Command]) -> None:
        pool = self.pools[pool_id]
        is_decode = pool.spec.role == "decode"
        for command in commands:
            if isinstance(command, SendControl):
                pool.to_coordinator.append(command.message)
                continue
            key: Key = (command.request_id, command.attempt)  # type: ignore[union-attr]
            match command:
                case OpenTargetBlocks():
                    self._open_target(pool_id, command)
                case CommitWhenRead():
                    self.handoffs[key, False].commit = command
                    self.handoffs[key, False].source = pool_id
                case AskFetch():
                    self._ask(pool_id, command)
                case ServeBlocks():
                    self._serve(pool_id, command)
                case RefuseFetch():
                    self._event(command.target_pool_id, HandoffBroken(*key, "target", "refused"))
                case CloseTarget():
                    self._close_target(pool_id, key, self.handoffs[key, not is_decode])
                case CloseSource():
                    self._close_source(pool_id, key, is_fetch=is_decode)

    def _open_target(self, pool_id: str, command: OpenTargetBlocks) -> None:
        key = (command.request_id, command.attempt)
        handoff = Handoff(target=pool_id)
        owners = command.owners or (0,) * len(command.blocks)
        for index, (ref, cp_rank) in enumerate(zip(command.blocks, owners, strict=True)):
            handoff.blocks[command.first_logical + index] = (cp_rank, ref.block_id)
        self.handoffs[key, self.specs[pool_id].role == "prefill"] = handoff
        self._event(pool_id, TargetIsOpen(*key))

    def _serve(self, pool_id: str, command: ServeBlocks) -> None:
        key = (command.request_id, command.attempt)
        handoff = self.handoffs[key, True]
        if handoff.is_target_closed:
            self._event(pool_id, HandoffBroken(*key, "source", "closed"))
            return
        handoff.source = pool_id
        for index, ref in enumerate(command.blocks):
            handoff.announced[command.first_logical + index] = (0, ref.block_id)

    def _event(self, pool_id: str, event: Event) -> None:
        if pool_id in self.pools:
            self.pools[pool_id].events.append(event)

    def _ask(self, pool_id: str, command: AskFetch) -> None:
        key = (command.request_id, command.attempt)
        source = self.pools.get(command.source_pool_id)
        if source is None or source.epoch != command.source_epoch:
            self._event(pool_id, HandoffBroken(*key, "target", "gone"))
            return
        epoch = self.pools[pool_id].epoch
        asked = FetchAsked(*key, pool_id, epoch, command.first_logical, command.owners)
        source.events.append(asked)

    def _close_target(self, pool_id: str, key: Key, handoff: Handoff) -> None:
        is_fetch = self.pools[pool_id].spec.role == "prefill"
        num_whole = 0
        if not handoff.is_target_closed:
            handoff.is_target_closed = True
            for logical in sorted(handoff.blocks):
                if logical not in handoff.read:
                    break
                num_whole += 1
            if handoff.source and not handoff.is_source_closed:
                self._break(key, is_fetch, handoff, "source", "the target has closed it")
        self._event(pool_id, TargetClosed(*key, num_whole))

    def _close_source(self, pool_id: str, key: Key, *, is_fetch: bool) -> None:
        handoff = self.handoffs.get((key, is_fetch))
        if handoff is not None and not handoff.is_source_closed:
            handoff.is_source_closed = True
            if not handoff.is_target_closed:
                self._break(key, is_fetch, handoff, "target", "given up by its source")
        elif handoff is not None and handoff.commit is not None and not handoff.is_broken:
            return  # it has been committed: that was said
        self._event(pool_id, SourceClosed(*key, committed=False))

    def _break(self, key: Key, is_fetch: bool, handoff: Handoff, side: str, reason: str) -> None:
        del is_fetch
        handoff.is_broken = True
        pool_id = handoff.target if side == "target" else handoff.source
        is_closed = handoff.is_target_closed if side == "target" else handoff.is_source_closed
        if not is_closed:
            self._event(pool_id, HandoffBroken(*key, side, reason))

    def moving(self) -> list[tuple[Key, bool]]:
        """Hand-offs of which a block can be read, or that can be committed."""
        return [name for name, handoff in self.handoffs.items() if self._can_move(handoff)]

    @staticmethod
    def _can_move(handoff: Handoff) -> bool:
        if handoff.is_source_closed or handoff.is_target_closed or not handoff.source:
            return False
        return bool(handoff.announced.keys() - handoff.read) or (
            handoff.commit is not None or handoff.blocks.keys() <= handoff.read
        )

    def move(self, name: tuple[Key, bool]) -> None:
        """One block is read and confirmed, or the whole is committed."""
        (key, is_fetch), handoff = name, self.handoffs[name]
        source, target = self.pools[handoff.source], self.pools[handoff.target]
        unread = sorted(handoff.announced.keys() - handoff.read)
        if unread:
            logical = unread[0]
            from_cp, from_block = handoff.announced[logical]
            to_cp, to_block = handoff.blocks[logical]
            for offset in range(BLOCK_SIZE):
                value = source.memory[from_cp].get((from_block, offset))
                if value is not None:
                    if (handoff.source, handoff.target) in self.broken_links:
                        value = (value[0], NAN)
                    target.memory[to_cp][to_block, offset] = value
            handoff.read.add(logical)
            return
        handoff.is_source_closed = handoff.is_target_closed = True
        commit = handoff.commit
        num_tokens, first = (commit.num_tokens, commit.first_token_id) if commit else (0, 0)
        assert is_fetch or handoff.blocks.keys() <= handoff.read, "committed, and not whole"
        source.events.append(SourceClosed(*key, committed=True))
        target.events.append(TargetCommitted(*key, num_tokens, first, TransferStats()))

    # -- the end -----------------------------------------------------------------------------------

    def choices(self) -> list[Callable[[], object]]:
        """Everything that could happen next by itself."""
        actions: list[Callable[[], object]] = []
        for pool_id, pool in self.pools.items():
            if self.to_pools[pool_id]:
                actions.append(lambda pool_id=pool_id: self.deliver_to_pool(pool_id))
            if pool.to_coordinator:
                actions.append(lambda pool_id=pool_id: self.deliver_to_coordinator(pool_id))
            actions.append(lambda pool_id=pool_id: self.step(pool_id))
        actions += [lambda name=name: self.move(name) for name in self.moving()]
        if self.slices:
            actions.append(self.slice)
        return actions

    def slice(self) -> None:
        """One step of the first work that is done in slices."""
        if next(self.slices[0], self) is self:
            self.slices.popleft()

    def round(self) -> None:
        """Every pool takes a step and everything that was said is heard."""
        for pool_id in list(self.pools):
            while self.to_pools.get(pool_id):
                self.deliver_to_pool(pool_id)
            if pool_id in self.pools:
                self.step(pool_id)
            while pool_id in self.pools and self.pools[pool_id].to_coordinator:
                self.deliver_to_coordinator(pool_id)
        for name in self.moving():
            while name in self.moving():
                self.move(name)

    def settle(self, max_rounds: int = 3000) -> None:
        """Let everything go on, in turn, until all requests are gone."""
        for _ in range(max_rounds):
            while self.slices:
                self.slice()
            self.round()
            self.sweep(0.25)
            if not self.service._records:
                break
        assert not self.service._records, f"never ends: {self.service._records}"
        for _ in range(3):
            for pool_id in self.pools:
                self.step(pool_id)
        for pool_id, pool in self.pools.items():
            load = pool.scheduler.load()
            spaces = (load.blocks,) if pool.spec.role == "decode" else load.blocks
            assert all(s.free + s.cached == s.total for s in spaces), (pool_id, spaces)

    def assert_loads(self) -> None:
        """What is counted as requests change is what all of them add up to."""
        loads = self.service.loads
        records = list(self.service._records.values())
        active = [record for record in records if record.is_active]
        assert loads.num_active == len(active)
        assert loads.num_interactive == sum(record.priority == 0 for record in active)
        assert loads.num_held("tenant") == len(records)
        for pool_id in self.specs:
            decode = [record for record in active if record.decode_pool == pool_id]
            assert loads.decode_tokens(pool_id) == sum(
                record.pending_decode_tokens
                + (0 if record.prefill_pool else record.pending_prefill_tokens)
                for record in decode
            )
            assert loads.prefill_tokens(pool_id) == sum(
                record.pending_prefill_tokens for record in active if record.prefill_pool == pool_id
            )
        ending = [record.request_id for record in records if not record.is_active]
        assert sorted(self.service.holding._ending) == sorted(ending)

    def assert_exact(self, name: str, max_tokens: int) -> None:
        """Each token once and right; all of them, or an explicit error after the last."""
        record, tokens = self.records[name], self.tokens(name)
        assert tokens == reference(self.prompts[name], len(tokens)), name
        error = self.deliveries[name]._error
        if error is None and record.finish_reason not in (None, "abort"):
            assert len(tokens) == max_tokens, (name, record.finish_reason)

    def assert_caches_finite(self) -> None:
        """No pool has KV that is not finite where a later prompt would find it."""
        for pool_id, pool in self.pools.items():
            is_decode = pool.spec.role == "decode"
            spaces = [pool.blocks] if is_decode else pool.scheduler._memory._blocks._spaces
            for cp_rank, space in enumerate(spaces):
                for block_id in space._by_hash.values():
                    slots = [pool.memory[cp_rank][block_id, o] for o in range(BLOCK_SIZE)]
                    assert all(token_id != NAN for _, token_id in slots), (pool_id, block_id)
