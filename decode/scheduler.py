"""The decisions of a decode pool. Pure: events and time come in, plans and commands go out.

The life of a request
1. ``Reserve`` queues it. When there is room it shares its cached prefix and gets blocks for the
   rest of its prompt and one token more: credits are given out before any prefill starts, so a
   prefill pool never holds blocks for which there is no room here.
2. Every rank opens the hand-off into those blocks; then the coordinator gets the ``Ticket``.
3. Either ``TargetCommitted``: it joins the batch with the token that the prefill pool sampled.
   Or ``ComputeHere``: the unused hand-off is closed, and the prompt is computed here in chunks.
4. A step computes the next token of every decoding sequence, and with what is left of the token
   budget the next chunks of prompts. Out of blocks, the newest sequence goes to host memory; the
   oldest comes back first, before any new one is admitted.
5. While the ticket is out, the prefill pool may fetch what is cached here of the prompt
   (prefix_exports.py). Those blocks stay in place until the fetch is seen to have ended.
6. At the end, an abort or a broken hand-off its blocks are given up, and ``Released`` is sent when
   no byte can land in them any more. Blocks that have arrived in full stay in the cache, so that
   the next attempt at the request goes on from there.

Events are handled between ``update`` and the next ``schedule``, never while a plan is under way.
"""

from collections.abc import Iterable

from decode.admission import Admission
from decode.batch import Batch
from decode.facts import DecodeFacts
from decode.loading import Loadings, TargetEvent
from decode.memory import SequenceMemory
from decode.prefix_exports import PrefixExports
from decode.sequence import Sequence
from decode.states import SequenceEvent, SequenceState
from engine.attempts import Attempts
from engine.leader_node import Commands
from kvcache.blocks import BlockPool
from kvtransfer.events import (
    CloseTarget,
    Command,
    ControlReceived,
    Event,
    HandoffBroken,
    Load,
    OpenTargetBlocks,
    SourceClosed,
    TargetClosed,
    TargetCommitted,
    TargetIsOpen,
)
from protocol.handoff import Fetch
from protocol.messages import (
    Abort,
    Ask,
    Committed,
    ComputeHere,
    NewToken,
    Released,
    RequestFailed,
    Reserve,
    Ticket,
    Tokens,
    ToRank,
)
from protocol.plans import DecodePlan, FailedRow, StepResult, outcomes
from protocol.request import NoToken, RequestKey, no_token_message

_TOTALS = (  # counted since the start, for heartbeats
    "requests_total",
    "prompt_tokens_total",
    "cached_tokens_total",
    "output_tokens_total",  # sampled here
    "kept_blocks_total",  # of hand-offs that did not complete
    "queue_s_total",
    "busy_s_total",
)


class DecodeScheduler:
    """The decisions of a decode pool's leader; see :class:`engine.leader_node.LeaderNode`.

    Args:
        facts: of the pool.
        blocks: its block space, for the scheduler alone.
    """

    def __init__(self, facts: DecodeFacts, blocks: BlockPool) -> None:
        self.facts = facts
        self._commands = Commands()
        self._memory = SequenceMemory(blocks, facts.watermark_blocks)
        self._batch = Batch(self._memory, facts)
        self._admission = Admission(self._memory, facts)
        self._loadings = Loadings(self._memory, facts, self._commands)
        self._exports = PrefixExports(blocks, self._commands)
        self._sequences: Attempts[Sequence] = Attempts()  # all that are not RELEASED
        self._num_closing = 0
        self._num_arrivals = 0
        self._plan: DecodePlan | None = None  # under way
        self._step_started_s = 0.0
        self._totals = dict.fromkeys(_TOTALS, 0.0)

    # -- in: events --------------------------------------------------------------------------------

    def on_event(self, event: Event, now: float) -> None:
        """Take in an event; see :class:`engine.leader_node.LeaderNode`."""
        assert self._plan is None, "events are handled between steps"
        match event:
            case ControlReceived(message):
                self._on_message(message, now)
            case Fetch() | SourceClosed() | HandoffBroken(side="source"):
                self._on_source(event, now)
            case TargetIsOpen() | TargetCommitted() | TargetClosed() | HandoffBroken():
                self._on_target(event, now)

    def _on_message(self, message: ToRank, now: float) -> None:
        match message:
            case Reserve():
                self._on_reserve(message, now)
            case ComputeHere():
                self._on_compute_here(message)
            case Abort():
                self._on_abort(message)
            case Ask():
                self._on_ask(message)

    def _on_reserve(self, message: Reserve, now: float) -> None:
        """Queue a request. A duplicate changes nothing; a newer attempt ends the older ones."""
        older = self._sequences.superseded_by(message.key)
        if older is None:
            return
        for sequence in older:
            self._give_up(sequence)
        sequence = Sequence.of(message, self._num_arrivals, now, self.facts.model_fingerprint)
        self._num_arrivals += 1
        self._sequences.begin(message.key, sequence)
        self._admission.add(sequence)
        refusal = self._admission.refusal(sequence)
        if refusal is not None:
            self._fail(sequence, "kv_capacity_exceeded", refusal)

    def _on_compute_here(self, message: ComputeHere) -> None:
        sequence = self._sequences.get(message.key)
        if sequence is None:
            return
        if sequence.state in (SequenceState.QUEUED, SequenceState.LOADING):
            sequence.is_local = True  # no hand-off will be opened
        elif sequence.state in (SequenceState.OPENING, SequenceState.RESERVED):
            if sequence.state is SequenceState.OPENING:
                self._give_ticket(sequence)
            sequence.is_local = True
            sequence.advance(SequenceEvent.COMPUTE_HERE)
            self._commands.add(CloseTarget(*sequence.key))

    def _on_abort(self, message: Abort) -> None:
        """Give the request up; answered by ``Released`` as often as it is asked for."""
        self._memory.forget(message.doubtful_hashes)
        sequence = self._sequences.get(message.key)
        if sequence is not None:
            sequence.is_doubtful |= message.is_doubtful
            self._give_up(sequence)
        elif message.key not in self._exports:  # else ``Released`` follows its last read
            # The abort may have overtaken its Reserve, which must not begin after this.
            self._sequences.end(message.key)
            self._commands.tell(Released(*message.key))

    def _on_ask(self, message: Ask) -> None:
        """Repeat how the request stands: an earlier message may have been lost."""
        sequence = self._sequences.get(message.key)
        if sequence is None:
            self._tell_released(message.key)
        elif sequence.has_ticket and sequence.state is not SequenceState.CLOSING:
            self._give_ticket(sequence)

    def _on_source(self, event: Fetch | SourceClosed | HandoffBroken, now: float) -> None:
        """An event of a fetch by another pool, of which this one is the source."""
        match event:
            case Fetch():
                self._exports.ask(event, self._sequences.get(event.key), now)
            case HandoffBroken():
                self._exports.close(event.key)
            case SourceClosed() if event.key in self._exports:
                self._exports.on_closed(event.key)
                self._memory.has_new_room = True
                if event.key not in self._sequences:
                    self._commands.tell(Released(*event.key))

    def _on_target(self, event: TargetEvent, now: float) -> None:
        """An event of a hand-off into this pool: of a prompt, or of a part from a store."""
        if self._loadings.owns(event):
            self._on_loading(event, now)
            return
        sequence = self._sequences.get(event.key)
        if sequence is None:
            return
        match event:
            case TargetIsOpen() if sequence.state is SequenceState.OPENING:
                sequence.advance(SequenceEvent.OPENED)
                self._give_ticket(sequence)
            case TargetCommitted() if sequence.holds_handoff:
                self._on_committed(sequence, event)
            case TargetClosed() if sequence.state in (
                SequenceState.SWITCHING,
                SequenceState.CLOSING,
            ):
                self._end_handoff(sequence, SequenceEvent.CLOSED, event.num_whole_blocks)
            case HandoffBroken() if sequence.state in (
                SequenceState.OPENING,
                SequenceState.RESERVED,
            ):
                self._fail(sequence, "handoff_failed", event.reason)

    def _on_committed(self, sequence: Sequence, event: TargetCommitted) -> None:
        if sequence.state is not SequenceState.RESERVED:
            # The commit has crossed the order to close: it ends the hand-off as well as its
            # closure would, and all of the prompt is here.
            self._end_handoff(sequence, SequenceEvent.COMMITTED, len(sequence.in_transfer))
        elif event.num_tokens != sequence.num_prompt_tokens:
            self._fail(
                sequence,
                "handoff_failed",
                f"{event.num_tokens} tokens were committed for a prompt of "
                f"{sequence.num_prompt_tokens}",
            )
            self._end_handoff(sequence, SequenceEvent.COMMITTED)
        else:
            sequence.num_computed_tokens = event.num_tokens
            sequence.output_token_ids.append(event.first_token_id)
            self._commands.tell(Committed(*sequence.key, stats=event.stats))
            self._end_handoff(sequence, SequenceEvent.COMMITTED)
            if sequence.finish_reason(self.facts.max_model_len) is not None:
                self._end(sequence)  # the coordinator has its only token from the prefill pool

    def _on_loading(self, event: TargetEvent, now: float) -> None:
        """A loading has ended: grant the sequence as any other, or finish closing it."""
        loaded = self._loadings.on_event(event, now)
        if loaded is None:
            return
        if loaded.sequence.state is SequenceState.LOADING:
            self._grant(loaded.sequence)
        else:
            self._end_handoff(loaded.sequence, SequenceEvent.CLOSED, loaded.num_blocks)

    # -- out: plans --------------------------------------------------------------------------------

    def schedule(self, now: float) -> DecodePlan | None:
        """The next step's plan, or None when there is nothing to do. ``update`` must follow."""
        assert self._plan is None, "the last plan has not been updated"
        self._loadings.tick(now)
        self._exports.tick(now)
        batch = self._batch
        batch.make_room(self._num_holders - len(batch.running))
        # Never admit in a step that pre-empts: a peer could write into blocks that a slower rank of
        # this pool has yet to copy to host memory.
        if not batch.preempted:
            self._admit(now)
        self._plan = batch.plan()
        self._step_started_s = now
        return self._plan

    @property
    def _num_holders(self) -> int:
        """Sequences that hold blocks of their own."""
        num_without = len(self._admission) + len(self._batch.preempted) + self._num_closing
        return len(self._sequences) - num_without

    def _admit(self, now: float) -> None:
        """Grant blocks to the sequences for which there is room."""
        while (sequence := self._admission.next(self._num_holders)) is not None:
            self._totals["requests_total"] += 1
            self._totals["prompt_tokens_total"] += sequence.num_prompt_tokens
            self._totals["cached_tokens_total"] += sequence.num_cached_tokens
            self._totals["queue_s_total"] += now - sequence.arrived_s
            if not self._loadings.begin(sequence, now):
                self._grant(sequence)

    def _grant(self, sequence: Sequence) -> None:
        """Compute the part of a prompt that is not cached here, or open a hand-off for it."""
        if sequence.is_local:
            sequence.advance(SequenceEvent.GRANT_LOCAL)
            self._give_ticket(sequence)
            self._batch.join(sequence)
        else:
            sequence.advance(SequenceEvent.GRANT)
            first = self._memory.begin_transfer(sequence)
            self._commands.add(
                OpenTargetBlocks(
                    *sequence.key, first_logical=first, blocks=tuple(sequence.in_transfer)
                )
            )

    def sampled(self, plan: DecodePlan) -> list[Sequence]:
        """The sequences of which ``plan`` samples a token, in its order."""
        return [self._sequences[step.key] for step in plan.sequences if step.sample]

    def update(self, plan: DecodePlan, results: Iterable[StepResult], now: float) -> None:
        """Take in the results of the step under way; rank 0 alone samples."""
        assert plan is self._plan, "only the plan under way can be updated"
        self._plan = None
        self._totals["busy_s_total"] += now - self._step_started_s
        rows = outcomes(results)
        new_tokens: list[NewToken] = []
        finished: list[Sequence] = []
        for step in plan.sequences:
            sequence = self._sequences[step.key]
            row = rows.get(step.key)
            if isinstance(row, FailedRow):
                self._fail_without_token(sequence, row.why)
                continue
            is_prompt = sequence.num_computed_tokens < sequence.num_prompt_tokens
            sequence.num_computed_tokens += len(step.token_ids)
            if is_prompt:
                self._memory.offer_prompt(sequence)
            if step.sample:
                assert row is not None, f"{sequence.key} has no token"
                new_tokens.append(sequence.append(row, self.facts.max_model_len))
                if new_tokens[-1].finish_reason is not None:
                    finished.append(sequence)
        if new_tokens:
            self._totals["output_tokens_total"] += len(new_tokens)
            self._commands.tell(Tokens(plan.step, tuple(new_tokens)))
        for sequence in finished:  # ``Released`` must not overtake the last token
            self._end(sequence)

    # -- the ways out ------------------------------------------------------------------------------

    def _give_ticket(self, sequence: Sequence) -> None:
        sequence.has_ticket = True
        self._commands.tell(
            Ticket(
                *sequence.key,
                num_cached_tokens=sequence.num_cached_tokens,
                num_loaded_tokens=sequence.num_loaded_tokens,
            )
        )

    def _fail(self, sequence: Sequence, code: str, message: str) -> None:
        self._commands.tell(RequestFailed(*sequence.key, code=code, message=message))
        self._give_up(sequence)

    def _fail_without_token(self, sequence: Sequence, why: NoToken) -> None:
        """End a sequence whose numbers give no token; its KV must not be found by others."""
        if why is NoToken.NON_FINITE:
            sequence.is_doubtful = True
            self._memory.forget(sequence.block_hashes)
        self._fail(sequence, why, no_token_message(why))

    def _give_up(self, sequence: Sequence) -> None:
        """End a sequence in whatever state it is."""
        if sequence.state is SequenceState.CLOSING:
            return
        if sequence.holds_handoff:
            self._close_handoff(sequence)
        else:
            self._end(sequence)

    def _close_handoff(self, sequence: Sequence) -> None:
        """Give up a sequence's blocks, except those in which a byte can still land.

        ``_end_handoff`` follows when none can, and gives up the rest.
        """
        if sequence.state is SequenceState.LOADING:
            self._loadings.close(sequence.key)
        elif sequence.state is not SequenceState.SWITCHING:  # then it is being closed already
            self._commands.add(CloseTarget(*sequence.key))
        self._exports.close(sequence.key)
        sequence.advance(SequenceEvent.CLOSE)
        self._memory.release_quiet(sequence)
        self._num_closing += 1

    def _end_handoff(
        self, sequence: Sequence, event: SequenceEvent, num_whole_blocks: int = 0
    ) -> None:
        """No byte can land any more: run, or keep the whole blocks in the cache and release."""
        sequence.advance(event)
        if sequence.state is SequenceState.RUNNING:
            self._memory.end_transfer(sequence)
            self._memory.offer_prompt(sequence)
            self._batch.join(sequence)
        else:
            self._memory.close_transfer(sequence, num_whole_blocks)
            self._totals["kept_blocks_total"] += num_whole_blocks
            self._num_closing -= 1
            self._release(sequence)

    def _end(self, sequence: Sequence) -> None:
        """End a sequence without hand-off: it has finished, or is given up."""
        if sequence.state is SequenceState.QUEUED:
            self._admission.remove(sequence)
        else:
            self._batch.leave(sequence)
        sequence.advance(SequenceEvent.END)
        if sequence.blocks:
            self._memory.release(sequence)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Forget a sequence, which holds no block any more."""
        self._sequences.end(sequence.key)
        self._exports.close(sequence.key)
        self._tell_released(sequence.key)

    def _tell_released(self, key: RequestKey) -> None:
        """Unless its cached prefix is still being read: then ``Released`` follows the last read."""
        if key not in self._exports:
            self._commands.tell(Released(*key))

    # -- out: commands and figures -----------------------------------------------------------------

    def take_commands(self) -> list[Command]:
        """The commands decided on since the last call, in order."""
        if (update := self._memory.take_cache_update()) is not None:
            self._commands.tell(update)
        return self._commands.take()

    @property
    def is_idle(self) -> bool:
        """Whether no request is here at all."""
        return not self._sequences and not len(self._exports)

    def check(self) -> None:
        """Assert that every block is accounted for."""
        self._memory.check()

    def load(self) -> Load:
        """The work that waits and runs, and the blocks that are held."""
        batch = self._batch
        return Load(
            num_waiting=len(self._admission) + len(batch.preempted),
            num_running=len(batch.running),
            pending_tokens=sum(sequence.num_pending_tokens for sequence in batch.running),
            blocks=(self._memory.counts(),),
            counters={
                **self._totals,
                "preemptions_total": batch.num_preemptions,
                "recomputed_tokens_total": batch.num_recomputed_tokens,
                "swapped_blocks": batch.num_swapped_blocks,
                "served_blocks_total": self._exports.num_blocks_total,
            },
        )
