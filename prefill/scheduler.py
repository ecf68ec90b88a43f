"""The decisions of a prefill pool. Pure: events and time come in, plans and commands go out.

The life of a request
1. ``Prefill``: it waits in the order of arrival. A prompt that can never be served fails at once.
2. ``schedule`` admits it with its first chunk: the cached prefix is shared, and all blocks of the
   rest are granted on the ranks of its ring. From now on it waits for no block. (backlog.py: the
   order; placement.py: the ranks; memory.py: the blocks.) If its decode pool holds more of the
   prefix, that is fetched before the first chunk; if the fetch fails, the request waits again and
   is computed.
3. Each step plans at most one chunk of it. ``update`` records the chunk, hashes its full blocks and
   sends the coordinator the progress. Ranks announce what they have computed without asking the
   leader.
4. The last chunk brings the first token, which goes to the coordinator at once. The transfer thread
   gets the manifest, and commits it when every target rank has read.
5. On ``SourceClosed`` its blocks are given back, in ``_release``. An abort, a broken hand-off or a
   lost target close the hand-off, or the fetch, first, and come to the same place.
"""

from collections.abc import Iterable, Sequence

from engine.attempts import Attempts
from engine.leader_node import Commands
from kvcache.blocks import BlockPool
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
    SourceClosed,
    TargetClosed,
    TargetCommitted,
    TargetIsOpen,
)
from prefill.backlog import Backlog, service_order
from prefill.facts import PrefillFacts
from prefill.manifest import segment_keys
from prefill.memory import RequestMemory
from prefill.placement import ChunkCosts, RingPlacement
from prefill.request import Request
from prefill.states import RequestEvent, RequestState
from protocol.kv import PoolEndpoint
from protocol.messages import (
    Abort,
    Ask,
    CacheUpdate,
    FirstToken,
    Prefill,
    Released,
    RequestFailed,
    ToRank,
)
from protocol.plans import ChunkWork, FailedRow, PrefillPlan, SampledToken, StepResult, outcomes
from protocol.request import NoToken, RequestKey, no_token_message

_COMPUTED_HERE = (RequestState.RUNNING, RequestState.HANDING_OVER)
_WITHOUT_SOURCE = (RequestState.WAITING, RequestState.FETCHING, RequestState.RETURNING)


class PrefillScheduler:
    """The decisions of a prefill pool's leader; see :class:`engine.leader_node.LeaderNode`.

    Args:
        facts: of the pool.
        spaces: its block spaces, one for each cp rank, for the scheduler alone.
        costs: of chunks on rings of any size.
    """

    def __init__(self, facts: PrefillFacts, spaces: Sequence[BlockPool], costs: ChunkCosts) -> None:
        self.facts = facts
        self._costs = costs
        self._memory = RequestMemory(facts, spaces, costs)
        self._commands = Commands()
        self._epochs: dict[str, int] = {}  # of the decode pools that can be reached
        self._requests: Attempts[Request] = Attempts()
        self._backlog = Backlog(facts.geometry.chunk_tokens)  # of them, those to be computed
        self._num_added = 0
        self._step = 0
        self._plan: PrefillPlan | None = None  # between schedule and update
        self._last_served: frozenset[RequestKey] = frozenset()
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_fetched_tokens = 0

    # -- in: events --------------------------------------------------------------------------------

    def on_event(self, event: Event, now: float) -> None:
        """Take in an event; see :class:`engine.leader_node.LeaderNode`."""
        match event:
            case ControlReceived(message):
                self._on_message(message, now)
            case SourceClosed() | HandoffBroken(side="source"):
                self._on_source(event)
            case TargetIsOpen() | TargetCommitted() | TargetClosed() | HandoffBroken():
                self._on_target(event)
            case PoolsChanged():
                self._on_pools(event.pools)

    def _on_message(self, message: ToRank, now: float) -> None:
        match message:
            case Prefill():
                self._on_prefill(message, now)
            case Abort():
                self._on_abort(message)
            case Ask():
                self._on_ask(message)

    def _on_prefill(self, message: Prefill, now: float) -> None:
        """Queue a prompt. A duplicate changes nothing; a newer attempt ends the older ones."""
        older = self._requests.superseded_by(message.key)
        if older is None:
            return
        for request in older:
            self._give_up(request)
        self._num_added += 1
        request = Request(message, now, self._num_added)
        self._requests.begin(message.key, request)
        self._backlog.add(request)
        refusal = self.facts.refusal(message, self._epochs)
        if refusal is not None:
            self._fail(request, *refusal)
            return
        salt = block_salt(self.facts.model_fingerprint, message.cache_salt)
        block_size = self.facts.geometry.block_size
        request.block_hashes = hash_blocks(message.prompt_token_ids, block_size, salt)

    def _on_abort(self, message: Abort) -> None:
        """Give the request up; answered by ``Released`` as often as it is asked for."""
        self._memory.disown(message.doubtful_hashes)
        request = self._requests.get(message.key)
        if request is not None:
            self._give_up(request)
        else:
            # The abort may have overtaken its Prefill, which must not begin after this.
            self._requests.end(message.key)
            self._commands.tell(Released(*message.key))

    def _on_ask(self, message: Ask) -> None:
        """Repeat how the request stands: an earlier message may have been lost."""
        request = self._requests.get(message.key)
        if request is None:
            self._commands.tell(Released(*message.key))
        elif request.state in _COMPUTED_HERE:
            self._commands.tell(request.progress())

    def _on_source(self, event: SourceClosed | HandoffBroken) -> None:
        """An event of the hand-off to the request's decode pool."""
        request = self._requests.get(event.key)
        if request is None:
            return
        if isinstance(event, HandoffBroken):
            self._fail(request, "handoff_failed", event.reason)
            return
        if request.state in _WITHOUT_SOURCE:
            return
        if not (event.committed or request.state is RequestState.CLOSING):
            message = "the hand-off was closed before it was complete"
            self._commands.tell(RequestFailed(*request.key, code="handoff_failed", message=message))
        if request.state is RequestState.RUNNING:
            self._stop(request)
        self._advance(request, RequestEvent.CLOSED)
        self._release(request)

    def _on_target(
        self, event: TargetIsOpen | TargetCommitted | TargetClosed | HandoffBroken
    ) -> None:
        """An event of the fetch from the request's decode pool."""
        request = self._requests.get(event.key)
        if request is None:
            return
        match event:
            case TargetIsOpen() if request.state is RequestState.FETCHING:
                self._commands.add(request.ask_fetch())
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
            case HandoffBroken() if request.state is RequestState.FETCHING:
                self._give_up_fetch(request)

    def _on_pools(self, pools: Iterable[PoolEndpoint]) -> None:
        self._epochs = {pool.pool_id: pool.epoch for pool in pools if pool.role != "prefill"}
        for request in list(self._requests.values()):
            target = request.message.target_pool_id
            if self._epochs.get(target) != request.message.target_epoch:
                self._fail(request, "stale_target", f"{target} has gone or has started again")

    # -- out: plans --------------------------------------------------------------------------------

    def schedule(self, now: float) -> PrefillPlan | None:
        """The next step, or None when there is nothing that can be done now."""
        assert self._plan is None, "the last plan's results have not come in"
        self._give_up_late_fetches(now)
        time = StepTime(self._costs, self.facts.geometry.cp_size, self.facts.step_target_s)
        work: list[ChunkWork] = []
        may_admit = True
        chunk_tokens = self.facts.geometry.chunk_tokens
        for request in service_order(self._backlog.candidates(), self._last_served, chunk_tokens):
            if time.is_full:
                break
            if request.state is RequestState.RUNNING:
                if not time.take(request.placed, request.num_chunks_done, request.priority):
                    continue
            elif self._memory.is_prefix_coming(request):
                continue  # another request computes this prefix now: wait, and find it cached
            else:
                may_admit = may_admit and self._num_holding < self.facts.max_num_sequences
                loads = load_s(self._backlog.begun, self.facts.geometry.cp_size)
                placement = self._memory.place(request, loads) if may_admit else None
                if placement is None:
                    # From here on admit none, or the younger would take the blocks for which an
                    # older request waits, for ever. Those that run go on.
                    may_admit = False
                    continue
                if placement.num_fetched_blocks:
                    self._fetch(request, placement, now)
                    continue
                if not time.take(placement, 0, request.priority):
                    self._memory.give_back(request)  # ``place`` has shared its prefix already
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

    def update(self, plan: PrefillPlan, results: Iterable[StepResult], now: float) -> None:
        """Record what the ranks did; requests that have ended meanwhile are left alone."""
        assert plan is self._plan, "results of another plan"
        self._plan = None
        rows = outcomes(results)
        for work in plan.work:
            request = self._requests.get(work.key)
            if request is None or request.state is not RequestState.RUNNING:
                continue
            row = rows.get(request.key)
            if isinstance(row, FailedRow):
                self._fail_without_token(request, row.why)
                continue
            self._chunk_done(request, work)
            if work.is_last:
                assert row is not None, f"{request.key} has no token"
                self._prompt_done(request, row, now)

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
        """The next chunk of an admitted request, which is about to be planned."""
        facts = self.facts
        message = request.message
        placement = request.placed
        chunk = placement.chunks[request.num_chunks_done]
        block_size = facts.geometry.block_size
        route = request.route(block_size)
        is_first = request.num_chunks_done == 0
        is_last = chunk.stop == request.num_tokens
        cached = request.blocks[route.first_logical : placement.num_cached_blocks]
        work = ChunkWork(
            *message.key,
            chunk=request.next_chunk,
            start=chunk.start,
            token_ids=message.prompt_token_ids[chunk.start : chunk.stop],
            ring=placement.ring,
            pass_q=self._costs.prefers_pass_q(len(chunk), chunk.start, len(placement.ring)),
            blocks=request.blocks[: -(-chunk.stop // block_size)],
            is_last=is_last,
            route=route,
            announce_cached=cached if is_first else (),
            sampling=message.sampling if is_last else None,
            prompt_token_ids=message.prompt_token_ids if is_last and request.needs_history else (),
            num_output_tokens=message.num_output_tokens,
        )
        if is_first:
            # Before the chunk is computed: if it kills this pool, the coordinator has to know that
            # this request was being computed, to keep it from killing other pools.
            self._commands.tell(request.progress())
        request.manifest += segment_keys(
            work, tp_size=facts.tp_size, block_size=block_size, groups=facts.layer_groups
        )
        # Ranks announce these while they compute, without asking, and targets read at once.
        first_new = max(chunk.start // block_size, route.first_logical)
        announced = (*work.announce_cached, *work.blocks[first_new:])
        self._memory.begin_transfer(request, announced)
        return work

    def _chunk_done(self, request: Request, work: ChunkWork) -> None:
        block_size = self.facts.geometry.block_size
        request.num_chunks_done += 1
        self.num_computed_tokens += len(work.token_ids)
        first = work.start // block_size
        end = request.num_computed_tokens // block_size
        self._memory.offer(request, request.blocks[first:end])
        self._commands.tell(request.progress())

    def _prompt_done(self, request: Request, sampled: SampledToken, now: float) -> None:
        self._advance(request, RequestEvent.COMPUTED)
        self._commands.tell(
            FirstToken(
                *request.key,
                token_id=sampled.token_id,
                path=request.path(self.facts.pool_id, now),
                logprobs=sampled.logprobs,
                finish_reason=request.finish_reason(sampled.token_id, self.facts.max_model_len),
                index=request.message.num_output_tokens,
            )
        )
        self._commands.add(request.commit(sampled.token_id))

    # -- a fetch from its decode pool --------------------------------------------------------------

    def _fetch(self, request: Request, placement: RingPlacement, now: float) -> None:
        """Admit a request, and have a part of its prefix read from its decode pool first."""
        self._admit(request, placement, now)
        self._advance(request, RequestEvent.FETCH)
        self._memory.begin_transfer(request, request.fetched_blocks)
        self._commands.add(request.open_fetch())

    def _give_up_late_fetches(self, now: float) -> None:
        """Compute instead of waiting: a fetch, or its answer, can be lost with a connection."""
        for request in self._backlog.fetching_since(now - self.facts.fetch_timeout_s):
            self._give_up_fetch(request)

    def _give_up_fetch(self, request: Request) -> None:
        """Compute a request instead, once no byte can land in its blocks any more."""
        request.may_fetch = False
        self._advance(request, RequestEvent.GIVE_UP)
        self._memory.expect_no_more(request)
        self._commands.add(CloseTarget(*request.key))

    # -- the ways out ------------------------------------------------------------------------------

    def _fail(self, request: Request, code: str, message: str) -> None:
        if request.state is not RequestState.CLOSING:
            self._commands.tell(RequestFailed(*request.key, code=code, message=message))
        self._give_up(request)

    def _fail_without_token(self, request: Request, why: NoToken) -> None:
        """End a request whose numbers give no token; its KV must not be found by others."""
        if why is NoToken.NON_FINITE:
            self._memory.disown(request.block_hashes)
        self._fail(request, why, no_token_message(why))

    def _give_up(self, request: Request) -> None:
        """End a request in whatever state it is."""
        match request.state:
            case RequestState.WAITING:
                self._advance(request, RequestEvent.DROP)
                self._release(request)
            case RequestState.FETCHING:
                self._commands.add(CloseTarget(*request.key))
                self._stop(request)
            case RequestState.RETURNING:  # its target is being closed already
                self._stop(request)
            case RequestState.RUNNING | RequestState.HANDING_OVER:
                self._commands.add(CloseSource(*request.key))
                self._stop(request)

    def _stop(self, request: Request) -> None:
        self._advance(request, RequestEvent.CLOSE)
        self._memory.expect_no_more(request)

    def _release(self, request: Request) -> None:
        """Give back what a request holds. No byte moves from or into its blocks any more."""
        self._memory.give_back(request)
        self._requests.end(request.key)
        self._commands.tell(Released(*request.key))

    # -- out: commands and figures -----------------------------------------------------------------

    def take_commands(self) -> list[Command]:
        """The commands decided on since the last call, in order."""
        stored, evicted = self._memory.take_cache_events()
        if stored or evicted:
            self._commands.tell(CacheUpdate(stored=stored, evicted=evicted))
        return self._commands.take()

    def load(self) -> Load:
        """The work that waits and runs, and the blocks that are held."""
        return Load(
            num_waiting=self._backlog.num_waiting,
            num_running=self._backlog.num_begun,
            pending_tokens=self._backlog.num_pending_tokens,
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
        """Assert that every block is accounted for, and that no request that is gone holds one."""
        held = [request.blocks for request in self._requests.values() if request.blocks]
        self._memory.check(sum(map(len, held)))
        assert self._num_holding == len(held)


# -- the time of a step ----------------------------------------------------------------------------


def load_s(begun: Sequence[Request], cp_size: int) -> list[float]:
    """Seconds that each cp rank has still to compute for the requests that have begun."""
    loads = [0.0] * cp_size
    for request in begun:
        placement = request.placed
        left = request.num_left_tokens / (request.num_tokens - placement.chunks[0].start)
        for rank in placement.ring:
            loads[rank] += placement.total_s * left
    return loads


class StepTime:
    """The predicted time of a step that is being put together.

    A step takes in more work as long as it does not become longer than its longest item or
    ``target_s``, whichever is more.
    """

    def __init__(self, costs: ChunkCosts, cp_size: int, target_s: float) -> None:
        self._costs = costs
        self._target_s = target_s
        self._finish_s = [0.0] * cp_size
        self._is_empty = True
        self._priority = 0  # of the first item

    @property
    def is_full(self) -> bool:
        """Whether no rank has time left."""
        return not self._is_empty and min(self._finish_s) >= self._limit_s

    def take(self, placement: RingPlacement, chunk_index: int, priority: int) -> bool:
        """Take in a chunk if it fits; the first always does.

        A chunk starts when all ranks of its ring are done with their earlier items. A chunk of a
        lower priority than the first only fills ranks that would wait: it must not make the step
        longer, because no result of a step is known before all of it is done.

        Returns:
            Whether the chunk is a part of the step.
        """
        chunk = placement.chunks[chunk_index]
        seconds = self._costs.seconds(len(chunk), chunk.start, len(placement.ring))
        end_s = max(self._finish_s[rank] for rank in placement.ring) + seconds
        if self._is_empty:
            self._priority = priority
        limit_s = self._limit_s if priority <= self._priority else max(self._finish_s)
        if not self._is_empty and end_s > limit_s:
            return False
        self._is_empty = False
        for rank in placement.ring:
            self._finish_s[rank] = end_s
        return True

    @property
    def _limit_s(self) -> float:
        return max(self._target_s, *self._finish_s)
