"""The coordinator's node with real leader and rank nodes, in memory, in any order of events.

What is played here: the memory of the ranks, whose KV of a token is ``(position, token)`` and whose
next token is a function of all KV that they see; one queue in each direction of each pool to the
coordinator, and one from each rank to each other; reads, which land when it is their turn; deaths
and restarts. Nothing happens but one thing at a time, and which, the test chooses.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.config import CoordinatorConfig, ExpectedPool
from coordinator.node import CoordinatorNode, Report, Send
from coordinator.request import Request
from coordinator.requests.delivery import Delivery
from coordinator.requests.service import Ports, at_once
from decode.facts import DecodeFacts
from decode.scheduler import DecodeScheduler
from engine.rank_node import HandoffPolicy, RankNode
from kvcache.blocks import BlockPool
from kvcache.prefix import block_salt, hash_blocks
from kvtransfer.events import ControlReceived, Event, PoolsChanged, SendControl
from kvtransfer.handoff.actions import StartRead
from kvtransfer.identity import PeerName, RankIdentity
from kvtransfer.plan import ByteRun
from prefill.announcer import Announcer
from prefill.facts import PrefillFacts
from prefill.manifest import layer_groups
from prefill.placement import Geometry
from prefill.scheduler import PrefillScheduler
from protocol.handoff import HandoffMessage
from protocol.kv import KVLayout
from protocol.messages import (
    PROTOCOL_VERSION,
    Connected,
    GangAddress,
    GangReady,
    Hello,
    Shutdown,
    ToCoordinator,
    Topology,
    ToRank,
    Welcome,
)
from protocol.plans import (
    DecodePlan,
    FailedRow,
    PrefillPlan,
    RowResult,
    SampledToken,
    StepResult,
)
from protocol.request import NoToken, SamplingParams
from protocol.token_ids import TokenIds
from tests.decode.fake_cluster import NAN, FakeRank, next_token, reference

Key = tuple[str, int]
BLOCK_SIZE = 4
FINGERPRINT = "model"
POLICY = HandoffPolicy(transport_name="memory", checksum="off", lease_s=30.0, max_reads=4)
GROUPS = layer_groups(1, 1)
Slots = dict[tuple[int, int], tuple[int, int]]  # (block, offset) -> (position, token)


class Costs:
    """A token costs a millisecond on any ring."""

    def seconds(self, new: int, cached: int, ring_size: int) -> float:
        return 0.001 * (new + cached / 8) / ring_size

    def prefers_pass_q(self, new: int, cached: int, ring_size: int) -> bool:
        return ring_size > 1 and cached > 4 * new

    def worth_taking(self, new: int, cached: int, ring_sizes: Sequence[int]) -> Sequence[int]:
        return ring_sizes if new + cached > 24 else ring_sizes[:1]


class Rank:
    """One rank: its node, and its memory, in which every slot says what was written there."""

    def __init__(
        self, cluster: "WholeCluster", identity: RankIdentity, num_blocks: int, slots: Slots
    ) -> None:
        self.cluster = cluster
        self.identity = identity
        self.slots = slots
        self.layout = KVLayout(1, num_blocks, 1, 0, 1, BLOCK_SIZE, 1, "float32")
        self.node = RankNode(identity, self.layout, self, self, POLICY)
        self.events: deque[Event] = deque()  # for its main thread
        self.announcer = Announcer(
            lambda command: self.node.command(command, cluster.now),
            cp_rank=identity.cp_rank,
            block_size=BLOCK_SIZE,
            groups=GROUPS,
        )

    def source_checksum(self, runs: Sequence[ByteRun]) -> int:
        raise AssertionError(f"nothing is summed here: {runs}")

    target_checksum = source_checksum

    def send(self, peer: PeerName, message: HandoffMessage) -> None:
        endpoint = self.node.around.endpoint(peer)
        if endpoint is not None:
            link = (self.identity.incarnation, endpoint.incarnation)
            self.cluster.links.setdefault(link, deque()).append(message)

    def read(self, read: StartRead) -> None:
        self.cluster.reads.append(Reading(self, read))

    def emit(self, event: Event) -> None:
        self.events.append(event)

    @property
    def endpoint(self) -> Any:
        return self.identity.endpoint(self.layout)

    def land(self, read: StartRead, source: "Rank", *, is_spoilt: bool) -> None:
        """The bytes of a read arrive, as they are at the source at this moment."""
        size = self.layout.block_bytes
        for run in read.runs:
            for at in range(0, run.num_bytes, size):
                block, to_block = (run.source_offset + at) // size, (run.target_offset + at) // size
                for offset in range(BLOCK_SIZE):
                    value = source.slots.get((block, offset))
                    if value is not None:
                        value = (value[0], NAN) if is_spoilt else value
                        self.slots[to_block, offset] = value


@dataclass(frozen=True)
class Reading:
    """A read in flight."""

    rank: Rank
    read: StartRead


Link = tuple[str, str]  # incarnations of a sender and of a receiver


class Pool:
    """One life of a pool."""

    def __init__(self, cluster: "WholeCluster", spec: ExpectedPool, life: int) -> None:
        self.spec = spec
        self.to_coordinator: deque[ToCoordinator] = deque()
        num_blocks = cluster.num_blocks[spec.pool_id]
        self.played = FakeRank(BLOCK_SIZE)  # executes the plans of a decode pool
        self.ranks = [
            Rank(
                cluster,
                RankIdentity(
                    spec.role, spec.pool_id, rank, spec.cp_size, 1, f"{spec.pool_id}{rank}.{life}"
                ),
                num_blocks,
                self.played.slots if spec.role == "decode" else {},
            )
            for rank in range(spec.num_ranks)
        ]
        self.node: Any
        if spec.role == "decode":
            self.blocks = BlockPool(num_blocks, BLOCK_SIZE)
            decode_facts = DecodeFacts(
                model_fingerprint=FINGERPRINT,
                max_model_len=1000,
                token_budget=16,
                max_num_sequences=4,
            )
            self.node = DecodeScheduler(decode_facts, self.blocks)
        else:
            facts = PrefillFacts(
                pool_id=spec.pool_id,
                geometry=Geometry(spec.cp_size, BLOCK_SIZE, 8),
                tp_size=1,
                num_blocks=num_blocks,
                layer_groups=GROUPS,
                model_fingerprint=FINGERPRINT,
                vocab_size=1000,
                max_model_len=1000,
                max_num_sequences=4,
                step_target_s=0.01,
            )
            spaces = [BlockPool(num_blocks, BLOCK_SIZE) for _ in range(spec.cp_size)]
            self.node = PrefillScheduler(facts, spaces, Costs())

    @property
    def events(self) -> deque[Event]:
        """For the main thread of its leader."""
        return self.ranks[0].events

    def kv(self, places: Sequence[tuple[int, int]], num_tokens: int) -> list[tuple[int, int]]:
        """What is found at the blocks ``(cp rank, block)`` of a sequence."""
        found = []
        for position in range(num_tokens):
            cp_rank, block_id = places[position // BLOCK_SIZE]
            found.append(self.ranks[cp_rank].slots[block_id, position % BLOCK_SIZE])
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
        self.slices: deque[Iterator[None]] = deque()
        spread = self.slices.append if in_slices else at_once
        self.node = CoordinatorNode(
            self.config,
            FINGERPRINT,
            epoch=1,
            ports=Ports(spread=spread),
            wake=self._obey_coordinator,
        )
        self.registry, self.service = self.node.registry, self.node.service
        self.pools: dict[str, Pool] = {}
        self.to_pools: dict[str, deque[ToRank]] = {}
        self.links: dict[Link, deque[HandoffMessage]] = {}
        self.reads: list[Reading] = []
        self.requests: dict[str, Request] = {}
        self.deliveries: dict[str, Delivery] = {}
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.num_lives: dict[str, int] = {}
        self.dispatched: list[tuple[str, ToRank]] = []
        self.lost: list[tuple[str, str]] = []  # pools, and why, as the launcher is told
        self.to_restart: list[str] = []  # pools that the coordinator has ended
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
        delivery = Delivery()
        request = Request(
            request_id=name,
            prompt_token_ids=TokenIds.of(prompt),
            block_hashes=tuple(hashes),
            sampling=sampling,
            tenant="tenant",
            receiver=delivery,
        )
        self.service.submit(request, self.now)
        self.requests[name] = request
        self.deliveries[name], self.prompts[name] = delivery, prompt

    def abort(self, name: str) -> None:
        self.service.abort(self.requests[name], self.now)

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
        pool = self.pools[pool_id] = Pool(self, spec, life)
        self.to_pools[pool_id] = deque()
        for rank in pool.ranks:
            gang = GangAddress("", "") if rank.identity.is_leader else None
            where = (spec.role, pool_id, spec.cp_size, 1, rank.endpoint, FINGERPRINT, 1000, gang)
            self._say(rank, Hello(PROTOCOL_VERSION, *where))
        for rank in pool.ranks:
            self._say(rank, GangReady())
        for other in self.pools.values():
            for rank in other.ranks:
                self._say(rank, Connected(self.registry.version))

    def kill_pool(self, pool_id: str) -> None:
        """It is gone, with all that it has not said; the coordinator notices at once."""
        self._end_pool(pool_id)
        self.node.lose_pool(pool_id, "killed", self.now)

    def _end_pool(self, pool_id: str) -> None:
        gone = {rank.identity.incarnation for rank in self.pools[pool_id].ranks}
        del self.pools[pool_id], self.to_pools[pool_id]
        self.links = {link: queue for link, queue in self.links.items() if not gone & set(link)}
        self.reads = [one for one in self.reads if one.rank.identity.incarnation not in gone]

    def _say(self, rank: Rank, message: ToCoordinator) -> None:
        self.node.on_message(rank.identity.routing_id, message, self.now)

    def _obey_coordinator(self) -> None:
        for command in self.node.take_commands():
            if isinstance(command, Send):
                self._hear(command.peer, command.message)
            elif isinstance(command, Report) and "lost" in command.news:
                self.lost.append((str(command.news["lost"]), str(command.news["reason"])))

    def _hear(self, peer: str, message: ToRank) -> None:
        """What is about a request waits in a queue; what is about the pools is heard at once."""
        ranks = (rank for pool in self.pools.values() for rank in pool.ranks)
        rank = next((rank for rank in ranks if rank.identity.routing_id == peer), None)
        if rank is None:
            return
        match message:
            case Welcome():
                rank.node.welcomed(message.pool_epoch)
            case Shutdown():
                self._end_pool(rank.identity.pool_id)
                self.to_restart.append(rank.identity.pool_id)
            case Topology():
                rank.node.pools_changed(message.pools, self.now)
                if rank.identity.is_leader:
                    rank.events.append(PoolsChanged(message.pools))
            case _:
                self.to_pools[rank.identity.pool_id].append(message)

    def deliver_to_pool(self, pool_id: str) -> None:
        message = self.to_pools[pool_id].popleft()
        self.dispatched.append((pool_id, message))
        self.pools[pool_id].events.append(ControlReceived(message))

    def deliver_to_coordinator(self, pool_id: str) -> None:
        pool = self.pools[pool_id]
        self._say(pool.ranks[0], pool.to_coordinator.popleft())

    def sweep(self, seconds: float = 1.0) -> None:
        self.now += seconds
        for pool in self.pools.values():
            for rank in pool.ranks:
                rank.node.tick(self.now)
        self.node.sweep(self.now)
        while self.to_restart:
            self.start_pool(self.to_restart.pop())

    # -- a step ------------------------------------------------------------------------------------

    def step(self, pool_id: str) -> bool:
        """The leader takes in its events and has a step executed; whether there was anything."""
        pool = self.pools[pool_id]
        is_idle = not pool.events
        while pool.events:
            pool.node.on_event(pool.events.popleft(), self.now)
            self._obey(pool_id)
        plan = pool.node.schedule(self.now)
        self._obey(pool_id)
        if plan is None:
            return not is_idle
        is_decode = pool.spec.role == "decode"
        names = {item.request_id for item in (plan.sequences if is_decode else plan.work)}
        if self._is_poisoned(pool_id, names):
            return True
        rows = self._decode(pool_id, plan) if is_decode else self._prefill(pool_id, plan)
        pool.node.update(plan, [StepResult.of(plan.step, 0, rows, 0.0)], self.now)
        self._obey(pool_id)
        pool.node.check()
        return True

    def _is_poisoned(self, pool_id: str, names: set[str]) -> bool:
        if not any(self.prompts.get(name) == self.poison for name in names):
            return False
        pool = self.pools[pool_id]
        while pool.to_coordinator:  # it had been sent before the step
            self.deliver_to_coordinator(pool_id)
        self.kill_pool(pool_id)
        return True

    def _decode(self, pool_id: str, plan: DecodePlan) -> list[RowResult]:
        pool = self.pools[pool_id]
        pool.played.is_broken = pool_id in self.broken
        return pool.played.execute(plan, pool.node.sampled(plan))

    def _prefill(self, pool_id: str, plan: PrefillPlan) -> list[RowResult]:
        pool = self.pools[pool_id]
        rows: list[RowResult] = []
        for work in plan.work:
            for position, token_id in enumerate(work.token_ids, work.start):
                block = work.blocks[position // BLOCK_SIZE]
                slot = (block.block_id, position % BLOCK_SIZE)
                value = NAN if pool_id in self.broken else token_id
                pool.ranks[block.cp_rank].slots[slot] = (position, value)
            for rank in pool.ranks:
                rank.announcer.play(work)
            if self.is_read_at_once:
                self.move_all()
            places = [(block.cp_rank, block.block_id) for block in work.blocks]
            kv = pool.kv(places, work.start + len(work.token_ids))
            if any(token_id == NAN for _, token_id in kv):
                rows.append(FailedRow(work.request_id, work.attempt, NoToken.NON_FINITE))
            elif work.is_last:
                rows.append(SampledToken(work.request_id, work.attempt, next_token(kv)))
        return rows

    def _obey(self, pool_id: str) -> None:
        pool = self.pools[pool_id]
        for command in pool.node.take_commands():
            if isinstance(command, SendControl):
                pool.to_coordinator.append(command.message)
            else:
                pool.ranks[0].node.command(command, self.now)

    # -- between ranks -----------------------------------------------------------------------------

    def moving(self) -> list[Link | Reading]:
        """Links on which a message waits, and reads that can land."""
        return [*(link for link, queue in self.links.items() if queue), *self.reads]

    def move(self, what: Link | Reading) -> None:
        """The next message of a link arrives, or the bytes of a read do."""
        ranks = {r.identity.incarnation: r for pool in self.pools.values() for r in pool.ranks}
        if isinstance(what, Reading):
            self.reads.remove(what)
            source = ranks.get(what.read.incarnation)
            if source is not None:
                link = (source.identity.pool_id, what.rank.identity.pool_id)
                what.rank.land(what.read, source, is_spoilt=link in self.broken_links)
            is_done = source is not None
            what.rank.node.read_ended(what.read.read_id, self.now, is_done=is_done)
        elif queue := self.links.get(what):
            sender, receiver = (ranks[incarnation] for incarnation in what)
            receiver.node.message(sender.identity.name, queue.popleft(), self.now)

    def move_all(self) -> None:
        while moving := self.moving():
            self.move(moving[0])

    def num_arrived(self, key: Key) -> int:
        """Leading blocks of a hand-off into a decode pool that are read and confirmed."""
        for pool in self.pools.values():
            handoff = pool.ranks[0].node.target._handoffs.get(key)
            if handoff is not None and pool.spec.role == "decode":
                count = 0
                while handoff.first_logical + count in handoff.covered:
                    count += 1
                return count
        return 0

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
        actions += [lambda what=what: self.move(what) for what in self.moving()]
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
        self.move_all()

    def settle(self, max_rounds: int = 3000) -> None:
        """Let everything go on, in turn, until all requests are gone."""
        for _ in range(max_rounds):
            while self.slices:
                self.slice()
            self.round()
            self.sweep(0.25)
            if not self.service.requests:
                break
        assert not self.service.requests, f"never ends: {self.service.requests}"
        for _ in range(3):
            for pool_id in self.pools:
                self.step(pool_id)
        for pool_id, pool in self.pools.items():
            spaces = pool.node.load().blocks
            assert all(s.free + s.cached == s.total for s in spaces), (pool_id, spaces)

    def assert_loads(self) -> None:
        """What is counted as requests change is what all of them add up to."""
        loads = self.service.loads
        requests = list(self.service.requests.values())
        active = [request for request in requests if request.is_active]
        assert loads.num_active == len(active)
        assert loads.num_interactive == sum(request.priority == 0 for request in active)
        assert loads.num_held("tenant") == len(requests)
        for pool_id in self.specs:
            decode = [request for request in active if request.decode_pool == pool_id]
            assert loads.decode_tokens(pool_id) == sum(
                request.pending_decode_tokens
                + (0 if request.prefill_pool else request.pending_prefill_tokens)
                for request in decode
            )
            assert loads.prefill_tokens(pool_id) == sum(
                request.pending_prefill_tokens
                for request in active
                if request.prefill_pool == pool_id
            )
        ending = [request.request_id for request in requests if not request.is_active]
        assert sorted(self.service.holding._ending) == sorted(ending)

    def assert_exact(self, name: str, max_tokens: int) -> None:
        """Each token once and right; all of them, or an explicit error after the last."""
        request, tokens = self.requests[name], self.tokens(name)
        assert tokens == reference(self.prompts[name], len(tokens)), name
        error = self.deliveries[name]._error
        if error is None and request.finish_reason not in (None, "abort"):
            assert len(tokens) == max_tokens, (name, request.finish_reason)

    def assert_caches_finite(self) -> None:
        """No pool has KV that is not finite where a later prompt would find it."""
        for pool_id, pool in self.pools.items():
            is_decode = pool.spec.role == "decode"
            spaces = [pool.blocks] if is_decode else pool.node._memory._spaces
            for cp_rank, space in enumerate(spaces):
                for block_id in space._by_hash.values():
                    slots = [pool.ranks[cp_rank].slots[block_id, o] for o in range(BLOCK_SIZE)]
                    assert all(token_id != NAN for _, token_id in slots), (pool_id, block_id)
