"""What a decode pool does next. Pure: messages and events in, plans and commands out.

The life of a request
1. ``Reserve`` queues it. When there is room it shares its cached prefix and gets blocks for the
   rest of its prompt and one token more: credits are given out before any prefill starts, so a
   prefill pool never holds blocks for which there is no room here.
2. The ranks are told to expect a hand-off into those blocks; once they do, ``Ticket``.
3. Either ``TargetCommitted``: it joins the batch with the token that the prefill pool sampled.
   Or ``ComputeHere``: the unused hand-off is closed, and the prompt is computed here in chunks.
4. A step computes the next token of every decoding sequence, and with what is left of the token
   budget the next chunks of prompts. Out of blocks, the newest sequence goes to host memory; the
   oldest comes back first, before anybody new is admitted.
5. While the ticket is out, the prefill pool may fetch what is cached here of the prompt
   (prefix_exports.py); what it reads stays in place until it is seen to have read.
6. The end, an abort, a broken hand-off: its blocks are given up and ``Released`` is said, after the
   last byte that could land in them has. Blocks that have arrived in full stay in the cache, so
   that the next attempt at the request goes on from there.

Events are handled between ``update`` and the next ``schedule``, never while a plan is under way.
"""

from collections.abc import Iterable

from decode.admission import Admission
from decode.batch import Batch, SchedulerLimits
from decode.loading import Loadings, TargetEvent
from decode.memory import SequenceMemory
from decode.prefix_exports import PrefixExports
from decode.sequence import Sequence
from decode.states import SequenceEvent, SequenceState
from decode.totals import Totals
from kvcache.blocks import BlockPool
from kvtransfer.events import (
    CloseTarget,
    Command,
    ControlReceived,
    Event,
    HandoffBroken,
    Load,
    OpenTargetBlocks,
    SendControl,
    SourceClosed,
    TargetClosed,
    TargetCommitted,
    TargetIsOpen,
)
from protocol.ended import ByAttempt, EndedAttempts
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
    ToCoordinator,
    Tokens,
)
from protocol.plans import DecodePlan, FailedRow, StepResult, outcomes
from protocol.request import NoToken, no_token_message


class DecodeScheduler:
    """The leader's decisions over one block space.

    Args:
        pool: the pool's block space, for the scheduler alone.
        limits: how much to take on.
        model_fingerprint: part of every block hash.
    """

    def __init__(self, pool: BlockPool, limits: SchedulerLimits, model_fingerprint: str) -> None:
        self._memory = SequenceMemory(pool, limits.watermark_blocks)
        self._batch = Batch(self._memory, limits)
        self._exports = PrefixExports(pool)
        self._loadings = Loadings(
            self._memory,
            min_tokens=limits.min_tokens_to_load,
            piece_blocks=limits.load_piece_blocks,
        )
        self._model_fingerprint = model_fingerprint
        self._max_len = limits.max_model_len
        self._sequences: ByAttempt[Sequence] = ByAttempt()  # all that are not RELEASED
        self._admission = Admission(self._memory, limits)
        self._ended = EndedAttempts()
        self._num_closing = 0
        self._commands: list[Command] = []
        self._plan: DecodePlan | None = None  # under way
        self._step_started_s = 0.0
        self._num_arrivals = 0
        self._totals = Totals()

    # -- in: events --------------------------------------------------------------------------------

    def on_event(self, event: Event, now: float) -> None:
        """Take note of a message or of what became of a hand-off; others' events are ignored."""
        assert self._plan is None, "events are handled between steps"
        match event:
            case ControlReceived(Reserve() as message):
                self._on_reserve(message, now)
            case ControlReceived(ComputeHere() as message):
                self._on_compute_here(message)
            case ControlReceived(Abort() as message):
                self._on_abort(message)
            case ControlReceived(Ask() as message):
                self._on_ask(message)
            case Fetch() | SourceClosed() | HandoffBroken(side="source"):
                self._on_source(event, now)
            case TargetIsOpen() | TargetCommitted() | TargetClosed() | HandoffBroken():
                self._on_target(event, now)

    def _on_target(self, event: TargetEvent, now: float) -> None:
        """What concerns this pool as the target of a hand-off."""
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
                self._close_handoff(sequence)

    def _on_reserve(self, message: Reserve, now: float) -> None:
        """Queue a request. A duplicate changes nothing; a newer attempt ends the older ones."""
        key = message.key
        others = self._sequences.of(message.request_id)
        if self._ended.covers(*key) or any(other.key[1] >= key[1] for other in others):
            return
        for other in others:
            self._give_up(other)
        sequence = Sequence.of(message, self._num_arrivals, now, self._model_fingerprint)
        self._num_arrivals += 1
        self._sequences[key] = sequence
        self._admission.add(sequence)
        refusal = self._admission.refusal(sequence)
        if refusal is not None:
            self._fail(sequence, "kv_capacity_exceeded", refusal)
            self._give_up(sequence)

    def _on_compute_here(self, message: ComputeHere) -> None:
        sequence = self._sequences.get(message.key)
        if sequence is None:
            return
        if sequence.state in (SequenceState.QUEUED, SequenceState.LOADING):
            sequence.is_local = True  # no hand-off need ever be opened
        elif sequence.state in (SequenceState.OPENING, SequenceState.RESERVED):
            if sequence.state is SequenceState.OPENING:
                self._give_ticket(sequence)
            sequence.is_local = True
            sequence.advance(SequenceEvent.COMPUTE_HERE)
            self._commands.append(CloseTarget(*sequence.key))

    def _on_abort(self, message: Abort) -> None:
        key = message.key
        sequence = self._sequences.get(key)
        self._memory.forget(message.doubtful_hashes)
        if sequence is not None:
            sequence.is_doubtful |= message.is_doubtful
            self._give_up(sequence)
        elif key not in self._exports:  # else it is said when the last read has ended
            self._ended.add(*key)
            self._send(Released(*key))

    def _on_ask(self, message: Ask) -> None:
        """Say again what may have been lost on its way."""
        key = message.key
        sequence = self._sequences.get(key)
        if sequence is not None:
            if sequence.has_ticket and sequence.state is not SequenceState.CLOSING:
                self._give_ticket(sequence)
        elif key not in self._exports:
            self._send(Released(*key))

    def _on_committed(self, sequence: Sequence, event: TargetCommitted) -> None:
        if sequence.state is not SequenceState.RESERVED:
            # Closing already: as good as closed, and all of it is here.
            self._end_handoff(sequence, SequenceEvent.COMMITTED, len(sequence.in_transfer))
        elif event.num_tokens != sequence.num_prompt_tokens:
            self._fail(
                sequence,
                "handoff_failed",
                f"{event.num_tokens} tokens were committed for a prompt of "
                f"{sequence.num_prompt_tokens}",
            )
            self._close_handoff(sequence)
            self._end_handoff(sequence, SequenceEvent.COMMITTED)
        else:
            sequence.num_computed_tokens = event.num_tokens
            sequence.output_token_ids.append(event.first_token_id)
            self._send(Committed(*sequence.key, stats=event.stats))
            self._end_handoff(sequence, SequenceEvent.COMMITTED)
            if sequence.finish_reason(self._max_len) is not None:
                self._end(sequence)  # the coordinator knows from the prefill pool

    def _on_source(self, event: Fetch | SourceClosed | HandoffBroken, now: float) -> None:
        """What concerns this pool as the source of a fetch."""
        key = event.key
        match event:
            case Fetch():
                self._commands += self._exports.ask(event, self._sequences.get(key), now)
            case HandoffBroken():
                self._commands += self._exports.close(key)
            case SourceClosed() if key in self._exports:
                self._exports.end(key)
                self._memory.has_new_room = True
                if key not in self._sequences:
                    self._send(Released(*key))

    # -- the ways out of a state -------------------------------------------------------------------

    def _give_ticket(self, sequence: Sequence) -> None:
        sequence.has_ticket = True
        self._send(
            Ticket(
                *sequence.key,
                num_cached_tokens=sequence.num_cached_tokens,
                num_loaded_tokens=sequence.num_loaded_tokens,
            )
        )

    def _end_handoff(
        self, sequence: Sequence, event: SequenceEvent, num_whole_blocks: int = 0
    ) -> None:
        """Nothing can land any more: run with what is here, or be gone and leave what is whole."""
        sequence.advance(event)
        if sequence.state is SequenceState.RUNNING:
            self._memory.end_transfer(sequence)
            self._memory.offer_prompt(sequence)
            self._batch.join(sequence)
        else:
            self._memory.close_transfer(sequence, num_whole_blocks)
            self._totals.num_kept_blocks += num_whole_blocks
            self._num_closing -= 1
            self._forget(sequence)

    def _close_handoff(self, sequence: Sequence) -> None:
        """Give up the blocks; those in which a byte can still land, when none can any more."""
        if sequence.state is SequenceState.LOADING:
            self._loadings.close(sequence.key)
        elif sequence.state is not SequenceState.SWITCHING:  # then it is being closed already
            self._commands.append(CloseTarget(*sequence.key))
        self._commands += self._exports.close(sequence.key)
        sequence.advance(SequenceEvent.CLOSE)
        self._memory.release_quiet(sequence)
        self._num_closing += 1

    def _give_up(self, sequence: Sequence) -> None:
        """End a sequence wherever it stands."""
        if sequence.state is SequenceState.CLOSING:
            return
        if sequence.holds_handoff:
            self._close_handoff(sequence)
        else:
            self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        """A sequence without hand-off is over: finished or given up."""
        if sequence.state is SequenceState.QUEUED:
            self._admission.remove(sequence)
        else:
            self._batch.leave(sequence)
        sequence.advance(SequenceEvent.END)
        if sequence.blocks:
            self._memory.release(sequence)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.key]
        self._ended.add(*sequence.key)
        self._commands += self._exports.close(sequence.key)
        if sequence.key not in self._exports:  # else it is said when the last read has ended
            self._send(Released(*sequence.key))

    def _fail(self, sequence: Sequence, code: str, message: str) -> None:
        self._send(RequestFailed(*sequence.key, code=code, message=message))

    def _send(self, message: ToCoordinator) -> None:
        self._commands.append(SendControl(message))

    # -- out: plans --------------------------------------------------------------------------------

    def schedule(self, now: float) -> DecodePlan | None:
        """The next step's plan, or None when there is nothing to do. ``update`` must follow."""
        assert self._plan is None, "the last plan has not been updated"
        self._loadings.tick(now)
        self._commands += self._exports.tick(now)
        batch = self._batch
        batch.make_room(self._num_holders - len(batch.running))
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
        """Grant blocks to those for whom there is room.

        Never in a step that pre-empts: a peer could write into blocks that a slower rank of this
        pool has yet to copy to host memory.
        """
        while (sequence := self._admission.next(self._num_holders)) is not None:
            self._totals.grant(sequence, now)
            if not self._loadings.begin(sequence, now):
                self._grant(sequence)

    def _grant(self, sequence: Sequence) -> None:
        """It has what is cached of it: go on with the rest, here or by a hand-off."""
        if sequence.is_local:
            sequence.advance(SequenceEvent.GRANT_LOCAL)
            self._give_ticket(sequence)
            self._batch.join(sequence)
        else:
            sequence.advance(SequenceEvent.GRANT)
            first = self._memory.begin_transfer(sequence)
            blocks = tuple(sequence.in_transfer)
            self._commands.append(
                OpenTargetBlocks(*sequence.key, first_logical=first, blocks=blocks)
            )

    def _on_loading(self, event: TargetEvent, now: float) -> None:
        """Its prefix comes up from a store, or will not; then it is granted as any other."""
        loaded = self._loadings.on_event(event, now)
        if loaded is None:
            return
        if loaded.sequence.state is SequenceState.LOADING:
            self._grant(loaded.sequence)
        else:
            self._end_handoff(loaded.sequence, SequenceEvent.CLOSED, loaded.num_blocks)

    def sampled(self, plan: DecodePlan) -> list[Sequence]:
        """The sequences of which ``plan`` samples a token, in its order."""
        steps = plan.sequences
        return [self._sequences[step.key] for step in steps if step.sample]

    def update(self, plan: DecodePlan, results: Iterable[StepResult], now: float) -> None:
        """Take note of what the step under way has brought; rank 0 alone samples."""
        assert plan is self._plan, "only the plan under way can be updated"
        self._plan = None
        self._totals.busy_s += now - self._step_started_s
        rows = outcomes(results)
        new_tokens: list[NewToken] = []
        finished: list[Sequence] = []
        for step in plan.sequences:
            sequence = self._sequences[step.key]
            if isinstance(row := rows.get(sequence.key), FailedRow):
                self._came_to_nothing(sequence, row.why)
                continue
            is_prompt = sequence.num_computed_tokens < sequence.num_prompt_tokens
            sequence.num_computed_tokens += len(step.token_ids)
            if is_prompt:
                self._memory.offer_prompt(sequence)
            if step.sample:
                assert row is not None, f"{sequence.key} has no token"
                new_tokens.append(sequence.append(row, self._max_len))
                if new_tokens[-1].finish_reason is not None:
                    finished.append(sequence)
        if new_tokens:
            self._totals.num_output_tokens += len(new_tokens)
            self._send(Tokens(plan.step, tuple(new_tokens)))
        for sequence in finished:  # its last token goes first
            self._end(sequence)

    def _came_to_nothing(self, sequence: Sequence, why: NoToken) -> None:
        """Its numbers give no token: it ends, and leaves nothing behind to be found."""
        if why is NoToken.NON_FINITE:
            sequence.is_doubtful = True
            self._memory.forget(sequence.block_hashes)
        self._fail(sequence, why, no_token_message(why))
        self._end(sequence)

    # -- out: commands and figures -----------------------------------------------------------------

    def take_commands(self) -> list[Command]:
        """What the transfer thread is to do, since the last call, in order."""
        if (update := self._memory.take_cache_update()) is not None:
            self._send(update)
        commands, self._commands = [*self._commands, *self._loadings.take_commands()], []
        return commands

    @property
    def is_idle(self) -> bool:
        """Whether no request is here at all."""
        return not self._sequences and not len(self._exports)

    def check(self) -> None:
        """Assert that every block is accounted for."""
        self._memory.check()

    def load(self) -> Load:
        """What the heartbeat says."""
        num_waiting, num_exported = len(self._admission), self._exports.num_blocks_total
        return self._totals.load(self._batch, num_waiting, num_exported, self._memory.counts())
