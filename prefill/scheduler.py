"""What a prefill pool does next. Pure: events and time come in, plans and commands go out.

The life of a request
1. ``add``: it waits in the order of arrival; what can never be served fails at once.
2. ``schedule`` admits it with its first chunk: the cached prefix is shared, all blocks of the rest
   are granted on the ranks of its ring. From now on it waits for no block. (step.py: who goes
   first; placement.py: on which ranks.)
3. Each step plans at most one chunk of it; ``update`` records it, hashes its full blocks and tells
   the coordinator how far it is. Ranks announce what they have computed without asking here.
4. The last chunk brings the first token: it is told at once, and the manifest is handed to the
   transfer thread to be committed when every target rank has read.
5. ``SourceClosed`` is the one event on which its blocks are given back, in ``_release`` alone.
   An abort, a broken hand-off or a lost target close the hand-off first and come to the same place.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvcache.prefix import block_salt, hash_blocks
from kvtransfer.events import (
    CloseSource,
    Command,
    CommitWhenRead,
    ControlReceived,
    Event,
    HandoffBroken,
    PoolsChanged,
    SendControl,
    SourceClosed,
)
from prefill.blocks import PoolBlocks, owned, placed
from prefill.facts import PoolFacts
from prefill.manifest import segment_keys
from prefill.placement import ChunkCosts, Placement, placements
from prefill.request import Key, Request
from prefill.states import Change, State
from prefill.step import StepTime, load_s, service_order
from protocol.kv import PoolEndpoint
from protocol.messages import (
    Abort,
    BlockCounts,
    CacheUpdate,
    FirstToken,
    Prefill,
    Progress,
    Released,
    RequestFailed,
    ToCoordinator,
)
from protocol.plans import ChunkWork, PrefillPlan, SampledToken, StepResult
from protocol.request import PrefillPath

NUM_REMEMBERED = 4096  # ended requests whose duplicates are recognised


@dataclass(frozen=True, slots=True)
class Load:
    """What the pool has to do, for its heartbeat."""

    num_waiting: int
    num_running: int
    pending_tokens: int
    blocks: tuple[BlockCounts, ...]


class PrefillScheduler:
    """The scheduler of a prefill pool's leader.

    Calls alternate: any number of ``add``, ``abort`` and ``on_event``, then ``schedule``, then
    ``update`` with the results of that plan. Every method but ``schedule`` returns the commands
    that are to be given to the transfer thread now, in order.
    """

    def __init__(self, facts: PoolFacts, costs: ChunkCosts) -> None:
        self.facts = facts
        self._costs = costs
        geometry = facts.geometry
        self._blocks = PoolBlocks(geometry.cp_size, facts.num_blocks, geometry.block_size)
        self._epochs: dict[str, int] = {}  # of the decode pools that can be reached
        self._requests: dict[Key, Request] = {}  # in order of arrival
        self._ended: OrderedDict[str, int] = OrderedDict()  # request_id -> latest attempt
        self._coming: set[bytes] = set()  # hashes of blocks that running requests will compute
        self._commands: list[Command] = []
        self._step = 0
        self._plan: PrefillPlan | None = None  # between schedule and update
        self._last_served: frozenset[Key] = frozenset()
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0

    # -- what comes in -----------------------------------------------------------------------------

    def add(self, message: Prefill, now: float) -> list[Command]:
        """Queue a prompt. A duplicate changes nothing; a newer attempt ends the older ones."""
        key = (message.request_id, message.attempt)
        latest = self._latest_attempt(message.request_id)
        if latest is not None and message.attempt <= latest:
            return self._take_commands()
        for other in [r for r in self._requests.values() if r.key[0] == message.request_id]:
            self._end(other)
        request = Request(message, now)
        self._requests[key] = request
        refusal = self.facts.refusal(message, self._epochs)
        if refusal is None:
            salt = block_salt(self.facts.model_fingerprint, message.cache_salt)
            block_size = self.facts.geometry.block_size
            request.block_hashes = hash_blocks(message.prompt_token_ids, block_size, salt)
        else:
            self._fail(request, *refusal)
        return self._take_commands()

    def abort(self, request_id: str, attempt: int) -> list[Command]:
        """Hold nothing of it any more; answered by ``Released`` however often it is asked."""
        request = self._requests.get((request_id, attempt))
        if request is not None:
            self._end(request)
        else:
            self._remember(request_id, attempt)
            self._tell(Released(request_id, attempt))
        return self._take_commands()

    def on_event(self, event: Event, now: float) -> list[Command]:
        """Take in what the transfer thread says; events that concern nobody here change nothing."""
        match event:
            case ControlReceived(message=Prefill() as message):
                return self.add(message, now)
            case ControlReceived(message=Abort() as message):
                return self.abort(message.request_id, message.attempt)
            case SourceClosed():
                self._on_closed(event)
            case HandoffBroken(side="source"):
                request = self._requests.get((event.request_id, event.attempt))
                if request is not None:
                    self._fail(request, "handoff_failed", event.reason)
            case PoolsChanged():
                self._on_pools(event.pools)
            case _:
                pass
        return self._take_commands()

    # -- a step ------------------------------------------------------------------------------------

    def schedule(self, now: float) -> PrefillPlan | None:
        """The next step, or None when there is nothing that can be done now."""
        assert self._plan is None, "the last plan's results have not come in"
        time = StepTime(self._costs, self.facts.geometry.cp_size, self.facts.step_target_s)
        work: list[ChunkWork] = []
        may_admit = True
        unfinished = self._in_state(State.RUNNING, State.WAITING)
        chunk_tokens = self.facts.geometry.chunk_tokens
        for request in service_order(unfinished, self._last_served, chunk_tokens):
            if time.is_full:
                break
            if request.state is State.RUNNING:
                if not time.take(request.placed, request.num_chunks_done):
                    continue
            elif self._is_prefix_coming(request):
                continue  # somebody computes for it already
            else:
                may_admit = may_admit and self._num_holding() < self.facts.max_num_sequences
                placement = self._place(request) if may_admit else None
                if placement is None:
                    may_admit = False  # nobody takes the blocks that an older request waits for
                    continue
                if not time.take(placement, 0):
                    self._give_back_prefix(request, placement)
                    continue
                self._admit(request, placement, now)
            work.append(self._chunk_work(request))
        if not work:
            return None
        self._step += 1
        self._last_served = frozenset((item.request_id, item.attempt) for item in work)
        self._plan = PrefillPlan(self._step, tuple(work))
        return self._plan

    def update(self, plan: PrefillPlan, results: Sequence[StepResult], now: float) -> list[Command]:
        """Record what the ranks did; requests that have ended meanwhile are left alone."""
        assert plan is self._plan, "results of another plan"
        self._plan = None
        tokens = {
            (token.request_id, token.attempt): token
            for result in results
            for token in result.tokens
        }
        for work in plan.work:
            request = self._requests.get((work.request_id, work.attempt))
            if request is not None and request.state is State.RUNNING:
                self._chunk_done(request, work)
                if work.is_last:
                    self._prompt_done(request, tokens[request.key], now)
        return self._take_commands()

    def load(self) -> Load:
        """What is waiting, running and held."""
        states = [request.state for request in self._requests.values()]
        unfinished = self._in_state(State.WAITING, State.RUNNING)
        return Load(
            num_waiting=states.count(State.WAITING),
            num_running=states.count(State.RUNNING),
            pending_tokens=sum(request.num_left_tokens for request in unfinished),
            blocks=self._blocks.counts(),
        )

    def check(self) -> None:
        """Assert that every block is accounted for, and that nothing is held for nobody."""
        held = sum(len(request.blocks) for request in self._requests.values())
        self._blocks.check()
        counts = self._blocks.counts()
        if held == 0:
            assert not self._coming
            assert all(c.owned == c.in_flight == c.quarantined == 0 for c in counts), counts

    # -- a request's way ---------------------------------------------------------------------------

    def _place(self, request: Request) -> Placement | None:
        """The best placement that there are blocks for; its cached prefix is shared from now on."""
        cached = self._blocks.match(self._hashes_to_hit(request))
        options = placements(
            self.facts.geometry,
            self._costs,
            num_tokens=request.num_tokens,
            cached_owners=[cp_rank for cp_rank, _ in cached],
            load_s=load_s(self._in_state(State.RUNNING), self.facts.geometry.cp_size),
        )
        for option in options:
            prefix = cached[: option.num_cached_blocks]
            if self._blocks.share(prefix, option.demand):
                request.blocks = placed(0, prefix)
                return option
        return None

    def _hashes_to_hit(self, request: Request) -> list[bytes]:
        """Of the blocks that it may find in the cache: its last token is always computed."""
        return request.block_hashes[: (request.num_tokens - 1) // self.facts.geometry.block_size]

    def _is_prefix_coming(self, request: Request) -> bool:
        """Whether a running request will soon have computed more of the same prefix."""
        hashes = self._hashes_to_hit(request)
        num_cached = len(self._blocks.match(hashes))
        return num_cached < len(hashes) and hashes[num_cached] in self._coming

    def _num_holding(self) -> int:
        return sum(bool(request.blocks) for request in self._requests.values())

    def _admit(self, request: Request, placement: Placement, now: float) -> None:
        new = self._blocks.allocate(placement.owners)
        request.blocks += placed(placement.num_cached_blocks, new)
        request.placement = placement
        request.admitted = now
        request.change(Change.ADMIT)
        self._coming.update(request.block_hashes[placement.num_cached_blocks :])
        self.num_cached_tokens += placement.chunks[0].start

    def _chunk_work(self, request: Request) -> ChunkWork:
        facts, message, placement = self.facts, request.message, request.placed
        chunk = placement.chunks[request.num_chunks_done]
        block_size = facts.geometry.block_size
        route = request.route(block_size)
        is_last = chunk.stop == request.num_tokens
        needs_prompt = message.sampling.repetition_penalty != 1.0
        cached = request.blocks[route.first_logical : placement.num_cached_blocks]
        work = ChunkWork(
            request_id=message.request_id,
            attempt=message.attempt,
            chunk=request.next_chunk,
            start=chunk.start,
            token_ids=message.prompt_token_ids[chunk.start : chunk.stop],
            ring=placement.ring,
            pass_q=self._costs.prefers_pass_q(len(chunk), chunk.start, len(placement.ring)),
            blocks=request.blocks[: -(-chunk.stop // block_size)],
            is_last=is_last,
            route=route,
            announce_cached=cached if request.num_chunks_done == 0 else (),
            sampling=message.sampling if is_last else None,
            prompt_token_ids=message.prompt_token_ids if is_last and needs_prompt else (),
        )
        request.manifest += segment_keys(
            work, tp_size=facts.tp_size, block_size=block_size, groups=facts.layer_groups
        )
        first_new = max(chunk.start // block_size, route.first_logical)
        announced = owned((*work.announce_cached, *work.blocks[first_new:]))
        self._blocks.begin_transfer(announced)
        request.in_transfer += announced
        return work

    def _chunk_done(self, request: Request, work: ChunkWork) -> None:
        block_size = self.facts.geometry.block_size
        request.num_chunks_done += 1
        self.num_computed_tokens += len(work.token_ids)
        first, end = work.start // block_size, request.num_computed_tokens // block_size
        for block in request.blocks[first:end]:
            self._blocks.set_hash(block, request.block_hashes[block.logical])
        self._coming.difference_update(request.block_hashes[first:end])
        self._tell(Progress(*request.key, request.num_computed_tokens, request.num_tokens))

    def _prompt_done(self, request: Request, sampled: SampledToken, now: float) -> None:
        message, placement = request.message, request.placed
        request.change(Change.COMPUTED)
        path = PrefillPath(
            pool_id=self.facts.pool_id,
            ring_size=len(placement.ring),
            num_chunks=len(placement.chunks),
            num_cached_tokens=placement.chunks[0].start,
            num_computed_tokens=request.num_tokens - placement.chunks[0].start,
            num_moved_tokens=max(0, request.num_tokens - message.num_target_tokens),
            queue_s=request.admitted - request.arrived,
            compute_s=now - request.admitted,
        )
        finish = request.finish_reason(sampled.token_id, self.facts.max_model_len)
        self._tell(FirstToken(*request.key, sampled.token_id, path, sampled.logprobs, finish))
        self._commands.append(
            CommitWhenRead(
                *request.key,
                target_pool_id=message.target_pool_id,
                target_epoch=message.target_epoch,
                manifest=tuple(request.manifest),
                num_tokens=request.num_tokens,
                first_token_id=sampled.token_id,
            )
        )

    # -- its end -----------------------------------------------------------------------------------

    def _end(self, request: Request) -> None:
        """Give a request up, from whatever state."""
        if request.state is State.WAITING:
            request.change(Change.DROP)
            self._release(request)
        elif request.state is not State.CLOSING:
            self._stop(request)
            self._commands.append(CloseSource(*request.key))

    def _stop(self, request: Request) -> None:
        request.change(Change.CLOSE)
        self._coming.difference_update(request.block_hashes)

    def _fail(self, request: Request, code: str, message: str) -> None:
        if request.state is not State.CLOSING:
            self._tell(RequestFailed(*request.key, code, message))
        self._end(request)

    def _on_closed(self, event: SourceClosed) -> None:
        request = self._requests.get((event.request_id, event.attempt))
        if request is None or request.state is State.WAITING:
            return
        if not (event.committed or request.state is State.CLOSING):
            message = "the hand-off was closed before it was complete"
            self._tell(RequestFailed(*request.key, "handoff_failed", message))
        if request.state is State.RUNNING:
            self._stop(request)
        request.change(Change.CLOSED)
        self._release(request)

    def _release(self, request: Request) -> None:
        """The one place where blocks are given back."""
        self._blocks.end_transfer(request.in_transfer)
        self._blocks.release(owned(request.blocks))
        del self._requests[request.key]
        self._remember(*request.key)
        self._tell(Released(*request.key))

    def _give_back_prefix(self, request: Request, placement: Placement) -> None:
        """It is not admitted in this step after all, though there are blocks for it."""
        assert len(request.blocks) == placement.num_cached_blocks
        self._blocks.release(owned(request.blocks))
        request.blocks = ()

    def _on_pools(self, pools: Iterable[PoolEndpoint]) -> None:
        self._epochs = {pool.pool_id: pool.epoch for pool in pools if pool.role == "decode"}
        for request in list(self._requests.values()):
            target = request.message.target_pool_id
            if self._epochs.get(target) != request.message.target_epoch:
                self._fail(request, "stale_target", f"{target} has gone or has started again")

    # -- small things ------------------------------------------------------------------------------

    def _in_state(self, *states: State) -> list[Request]:
        return [request for request in self._requests.values() if request.state in states]

    def _latest_attempt(self, request_id: str) -> int | None:
        attempts = [attempt for known, attempt in self._requests if known == request_id]
        if request_id in self._ended:
            attempts.append(self._ended[request_id])
        return max(attempts, default=None)

    def _remember(self, request_id: str, attempt: int) -> None:
        self._ended[request_id] = max(attempt, self._ended.pop(request_id, attempt))
        if len(self._ended) > NUM_REMEMBERED:
            self._ended.popitem(last=False)

    def _tell(self, message: ToCoordinator) -> None:
        self._commands.append(SendControl(message))

    def _take_commands(self) -> list[Command]:
        stored, evicted = self._blocks.take_cache_events()
        if stored or evicted:
            self._tell(CacheUpdate(stored, evicted))
        commands, self._commands = self._commands, []
        return commands
