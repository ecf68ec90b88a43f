"""What a prefill pool does next. Pure: events and time come in, plans and commands go out.

The life of a request
1. ``Prefill``: it waits in the order of arrival; what can never be served fails at once.
2. ``schedule`` admits it with its first chunk: the cached prefix is shared, all blocks of the rest
   are granted on the ranks of its ring. From now on it waits for no block. (step.py: who goes
   first; placement.py: on which ranks; memory.py: the blocks.) If its decode pool holds more of the
   prefix, that is fetched before the first chunk; if this fails it waits again, to be computed.
3. Each step plans at most one chunk of it; ``update`` records it, hashes its full blocks and tells
   the coordinator how far it is. Ranks announce what they have computed without asking here.
4. The last chunk brings the first token: it is told at once, and the manifest is handed to the
   transfer thread to be committed when every target rank has read.
5. On ``SourceClosed`` its blocks are given back, in ``_release``. An abort, a broken hand-off or a
   lost target close the hand-off first, or else the fetch, and come to the same place.
"""

from collections.abc import Iterable

from kvcache.prefix import block_salt, hash_blocks
from kvtransfer.events import (
    CloseSource,
    CloseTarget,
    Command,
    ControlReceived,
    Event,
    HandoffBroken,
    Load,
    PoolsChanged,
    SendControl,
    SourceClosed,
    TargetClosed,
    TargetCommitted,
    TargetIsOpen,
)
from prefill.backlog import Backlog
from prefill.facts import PoolFacts
from prefill.manifest import segment_keys
from prefill.memory import RequestMemory
from prefill.placement import ChunkCosts, RingPlacement
from prefill.request import Request
from prefill.states import RequestEvent, RequestState
from prefill.step import StepTime, load_s, service_order
from protocol.ended import ByAttempt, EndedAttempts
from protocol.kv import PoolEndpoint
from protocol.messages import (
    Abort,
    Ask,
    CacheUpdate,
    FirstToken,
    Prefill,
    Released,
    RequestFailed,
    ToCoordinator,
)
from protocol.plans import ChunkWork, FailedRow, PrefillPlan, SampledToken, StepResult, outcomes
from protocol.request import NoToken, RequestKey, no_token_message

_COMPUTED_HERE = (RequestState.RUNNING, RequestState.HANDING_OVER)
_WITHOUT_SOURCE = (RequestState.WAITING, RequestState.FETCHING, RequestState.RETURNING)


class PrefillScheduler:
    """The decisions of a prefill pool's leader; see :class:`engine.leader_node.LeaderNode`."""

    def __init__(self, facts: PoolFacts, costs: ChunkCosts) -> None:
        self.facts = facts
        self._costs = costs
        self._memory = RequestMemory(facts, costs)
        self._epochs: dict[str, int] = {}  # of the decode pools that can be reached
        self._requests: ByAttempt[Request] = ByAttempt()
        self._backlog = Backlog(facts.geometry.chunk_tokens)  # what of them is to be computed
        self._num_added = 0
        self._ended = EndedAttempts()
        self._commands: list[Command] = []
        self._step = 0
        self._plan: PrefillPlan | None = None  # between schedule and update
        self._last_served: frozenset[RequestKey] = frozenset()
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_fetched_tokens = 0

    # -- what comes in -----------------------------------------------------------------------------

    def _on_prefill(self, message: Prefill, now: float) -> None:
        """Queue a prompt. A duplicate changes nothing; a newer attempt ends the older ones."""
        key = message.key
        others = self._requests.of(message.request_id)
        if self._ended.covers(*key) or any(other.key[1] >= message.attempt for other in others):
            return
        for other in others:
            self._end(other)
        self._num_added += 1
        request = Request(message, now, self._num_added)
        self._requests[key] = request
        self._backlog.add(request)
        refusal = self.facts.refusal(message, self._epochs)
        if refusal is None:
            salt = block_salt(self.facts.model_fingerprint, message.cache_salt)
            block_size = self.facts.geometry.block_size
            request.block_hashes = hash_blocks(message.prompt_token_ids, block_size, salt)
        else:
            self._fail(request, *refusal)

    def _on_abort(self, message: Abort) -> None:
        """Hold nothing of it any more; answered by ``Released`` however often it is asked."""
        key = message.key
        self._memory.disown(message.doubtful_hashes)
        request = self._requests.get(key)
        if request is not None:
            self._end(request)
        else:
            self._ended.add(*key)
            self._tell(Released(*key))

    def _on_ask(self, message: Ask) -> None:
        """Say again how it stands: something may have been lost on its way."""
        key = message.key
        request = self._requests.get(key)
        if request is None:
            self._tell(Released(*key))
        elif request.state in _COMPUTED_HERE:
            self._tell(request.progress())

    def on_event(self, event: Event, now: float) -> None:
        """Take in what the transfer thread says; events that concern nobody here change nothing."""
        match event:
            case ControlReceived(Prefill() as message):
                self._on_prefill(message, now)
            case ControlReceived(Abort() as message):
                self._on_abort(message)
            case ControlReceived(Ask() as message):
                self._on_ask(message)
            case SourceClosed():
                self._on_closed(event)
            case TargetIsOpen() | TargetCommitted() | TargetClosed():
                self._on_fetch(event)
            case HandoffBroken():
                self._on_broken(event)
            case PoolsChanged():
                self._on_pools(event.pools)

    # -- a step ------------------------------------------------------------------------------------

    def schedule(self, now: float) -> PrefillPlan | None:
        """The next step, or None when there is nothing that can be done now."""
        assert self._plan is None, "the last plan's results have not come in"
        self._give_up_late_fetches(now)
        time = StepTime(self._costs, self.facts.geometry.cp_size, self.facts.step_target_s)
        work, may_admit = list[ChunkWork](), True
        chunk_tokens = self.facts.geometry.chunk_tokens
        for request in service_order(self._backlog.candidates(), self._last_served, chunk_tokens):
            if time.is_full:
                break
            if request.state is RequestState.RUNNING:
                if not time.take(request.placed, request.num_chunks_done, request.priority):
                    continue
            elif self._memory.is_prefix_coming(request):
                continue  # somebody computes for it already
            else:
                may_admit = may_admit and self._num_holding < self.facts.max_num_sequences
                loads = load_s(self._backlog.begun, self.facts.geometry.cp_size)
                placement = self._memory.place(request, loads) if may_admit else None
                if placement is None:
                    may_admit = False  # nobody takes the blocks that an older request waits for
                    continue
                if placement.num_fetched_blocks:
                    self._fetch(request, placement, now)
                    continue
                if not time.take(placement, 0, request.priority):
                    self._memory.give_back(request)  # not in this step after all
                    continue
                self._admit(request, placement, now)
                self._advance(request, RequestEvent.ADMIT)
            work.append(self._chunk_work(request))
        if not work:
            return None
        self._step += 1
        self._last_served = frozenset(item.key for item in work)
        self._plan = PrefillPlan(self._step, tuple(work))
        return self._plan

    def take_commands(self) -> list[Command]:
        """What the transfer thread is to do, since the last call, in order."""
        stored, evicted = self._memory.take_cache_events()
        if stored or evicted:
            self._tell(CacheUpdate(stored, evicted))
        commands, self._commands = self._commands, []
        return commands

    def update(self, plan: PrefillPlan, results: Iterable[StepResult], now: float) -> None:
        """Record what the ranks did; requests that have ended meanwhile are left alone."""
        assert plan is self._plan, "results of another plan"
        self._plan = None
        rows = outcomes(results)
        for work in plan.work:
            request = self._requests.get(work.key)
            if request is None or request.state is not RequestState.RUNNING:
                continue
            if isinstance(row := rows.get(request.key), FailedRow):
                self._came_to_nothing(request, row.why)
                continue
            self._chunk_done(request, work)
            if work.is_last:
                assert row is not None, f"{request.key} has no token"
                self._prompt_done(request, row, now)

    def load(self) -> Load:
        """What is waiting, running and held."""
        backlog = self._backlog
        return Load(
            num_waiting=backlog.num_waiting,
            num_running=backlog.num_begun,
            pending_tokens=backlog.num_pending_tokens,
            blocks=self._memory.counts(),
            counters={
                "prefill_computed_tokens": self.num_computed_tokens,
                "prefill_cached_tokens": self.num_cached_tokens,
                "prefill_fetched_tokens": self.num_fetched_tokens,
            },
        )

    @property
    def is_idle(self) -> bool:
        """Whether no request is here at all."""
        return not self._requests

    def check(self) -> None:
        """Assert that every block is accounted for, and that nothing is held for nobody."""
        held = [request.blocks for request in self._requests.values() if request.blocks]
        self._memory.check(sum(map(len, held)))
        assert self._num_holding == len(held)

    # -- a request's way ---------------------------------------------------------------------------

    @property
    def _num_holding(self) -> int:
        """Requests that hold blocks: all that do not wait."""
        return len(self._requests) - self._backlog.num_waiting

    def _advance(self, request: Request, event: RequestEvent) -> None:
        before = request.state
        request.advance(event)
        self._backlog.moved(request, before)

    def _admit(self, request: Request, placement: RingPlacement, now: float) -> None:
        self._memory.grant(request, placement)
        request.admitted = now
        self.num_cached_tokens += placement.num_cached_blocks * self.facts.geometry.block_size

    def _chunk_work(self, request: Request) -> ChunkWork:
        facts, message, placement = self.facts, request.message, request.placed
        chunk = placement.chunks[request.num_chunks_done]
        block_size = facts.geometry.block_size
        route = request.route(block_size)
        is_last = chunk.stop == request.num_tokens
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
            prompt_token_ids=message.prompt_token_ids if is_last and request.needs_history else (),
            num_output_tokens=message.num_output_tokens,
        )
        if request.num_chunks_done == 0:
            self._tell(request.progress())  # before it is computed: it may be what kills us
        request.manifest += segment_keys(
            work, tp_size=facts.tp_size, block_size=block_size, groups=facts.layer_groups
        )
        first_new = max(chunk.start // block_size, route.first_logical)
        announced = (*work.announce_cached, *work.blocks[first_new:])
        self._memory.begin_transfer(request, announced)
        return work

    def _chunk_done(self, request: Request, work: ChunkWork) -> None:
        block_size = self.facts.geometry.block_size
        request.num_chunks_done += 1
        self.num_computed_tokens += len(work.token_ids)
        first, end = work.start // block_size, request.num_computed_tokens // block_size
        self._memory.offer(request, request.blocks[first:end])
        self._tell(request.progress())

    def _prompt_done(self, request: Request, sampled: SampledToken, now: float) -> None:
        self._advance(request, RequestEvent.COMPUTED)
        path = request.path(self.facts.pool_id, now)
        finish = request.finish_reason(sampled.token_id, self.facts.max_model_len)
        index = request.message.num_output_tokens
        self._tell(
            FirstToken(
                *request.key,
                token_id=sampled.token_id,
                path=path,
                logprobs=sampled.logprobs,
                finish_reason=finish,
                index=index,
            )
        )
        self._commands.append(request.commit(sampled.token_id))

    # -- what its decode pool has of it ------------------------------------------------------------

    def _fetch(self, request: Request, placement: RingPlacement, now: float) -> None:
        """Admit it, and have a part of its prefix read from its decode pool first."""
        self._admit(request, placement, now)
        self._advance(request, RequestEvent.FETCH)
        self._memory.begin_transfer(request, request.fetched_blocks)
        self._commands.append(request.open_fetch())

    def _on_fetch(self, event: TargetIsOpen | TargetCommitted | TargetClosed) -> None:
        request = self._requests.get(event.key)
        if request is None:
            return
        match event:
            case TargetIsOpen() if request.state is RequestState.FETCHING:
                self._commands.append(request.ask_fetch())
            case TargetCommitted() if request.state is RequestState.FETCHING:
                self._advance(request, RequestEvent.FETCHED)
                self._memory.end_transfer(request)
                self._memory.offer(request, request.fetched_blocks)
                num_blocks = len(request.fetched_blocks)
                self.num_fetched_tokens += num_blocks * self.facts.geometry.block_size
            case TargetClosed() if request.state is RequestState.RETURNING:
                self._advance(request, RequestEvent.CLOSED)
                self._memory.give_back(request)
            case TargetClosed() if request.state is RequestState.CLOSING:
                self._advance(request, RequestEvent.CLOSED)
                self._release(request)

    def _on_broken(self, event: HandoffBroken) -> None:
        request = self._requests.get(event.key)
        if request is None:
            return
        if event.side == "source":
            self._fail(request, "handoff_failed", event.reason)
        elif request.state is RequestState.FETCHING:
            self._give_up_fetch(request)

    def _give_up_late_fetches(self, now: float) -> None:
        """A request for blocks, or its answer, can be lost with a connection."""
        for request in self._backlog.fetching_since(now - self.facts.fetch_timeout_s):
            self._give_up_fetch(request)

    def _give_up_fetch(self, request: Request) -> None:
        """It can still be computed, once nothing can land in its blocks any more."""
        request.may_fetch = False
        self._advance(request, RequestEvent.GIVE_UP)
        self._memory.expect_no_more(request)
        self._commands.append(CloseTarget(*request.key))

    # -- its end -----------------------------------------------------------------------------------

    def _end(self, request: Request) -> None:
        """Give a request up, from whatever state."""
        if request.state is RequestState.WAITING:
            self._advance(request, RequestEvent.DROP)
            self._release(request)
        elif request.state is not RequestState.CLOSING:
            if request.state is RequestState.FETCHING:
                self._commands.append(CloseTarget(*request.key))
            elif request.state is not RequestState.RETURNING:  # its target is being closed already
                self._commands.append(CloseSource(*request.key))
            self._stop(request)

    def _came_to_nothing(self, request: Request, why: NoToken) -> None:
        """Its numbers give no token, and nobody is to find its KV."""
        if why is NoToken.NON_FINITE:
            self._memory.disown(request.block_hashes)
        self._fail(request, why, no_token_message(why))

    def _stop(self, request: Request) -> None:
        self._advance(request, RequestEvent.CLOSE)
        self._memory.expect_no_more(request)

    def _fail(self, request: Request, code: str, message: str) -> None:
        if request.state is not RequestState.CLOSING:
            self._tell(RequestFailed(*request.key, code=code, message=message))
        self._end(request)

    def _on_closed(self, event: SourceClosed) -> None:
        request = self._requests.get(event.key)
        if request is None or request.state in _WITHOUT_SOURCE:
            return
        if not (event.committed or request.state is RequestState.CLOSING):
            message = "the hand-off was closed before it was complete"
            self._tell(RequestFailed(*request.key, code="handoff_failed", message=message))
        if request.state is RequestState.RUNNING:
            self._stop(request)
        self._advance(request, RequestEvent.CLOSED)
        self._release(request)

    def _release(self, request: Request) -> None:
        self._memory.give_back(request)
        del self._requests[request.key]
        self._ended.add(*request.key)
        self._tell(Released(*request.key))

    def _on_pools(self, pools: Iterable[PoolEndpoint]) -> None:
        self._epochs = {pool.pool_id: pool.epoch for pool in pools if pool.role != "prefill"}
        for request in list(self._requests.values()):
            target = request.message.target_pool_id
            if self._epochs.get(target) != request.message.target_epoch:
                self._fail(request, "stale_target", f"{target} has gone or has started again")

    def _tell(self, message: ToCoordinator) -> None:
        self._commands.append(SendControl(message))
