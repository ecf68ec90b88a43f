"""One process's share of a run: every request is sent when its user wants it, come what may.

1. ``prepare`` writes every session's first request into a file: sending costs next to nothing.
2. Open loop: each session starts at its instant. Closed loop: each of a number of users takes the
   next session when it is free. Later turns follow the end of the turn before and the think time.
3. Every request becomes a record, also those that were never sent. The number in flight is counted
   on the way, for the check by Little's law.
"""

import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import IO, Literal

import msgspec

from bench.load.analysis.intervals import percentile
from bench.load.analysis.slo import Slo
from bench.load.analysis.validity import CPU_WINDOW_S, Audit, largest_share
from bench.load.driving.client import Address, Budgets, Client
from bench.load.driving.pacer import Pacer
from bench.load.driving.reply import Reply
from bench.load.record import CANCELLED, OK, RequestRecord
from bench.load.workload.prompts import Api, Conversation, Dialect
from bench.load.workload.schedule import Planned, Schedule

_TICK_S = 0.01


class Target(msgspec.Struct, frozen=True):
    """A server as a run sees it."""

    name: str
    url: str
    dialect: Dialect
    api_key: str = ""


class Load(msgspec.Struct, frozen=True):
    """What one process has to do.

    Args:
        num_users: of the closed loop.
        duration_s: the closed loop begins no session after it.
    """

    target: Target
    schedule: Schedule
    run_id: str
    budgets: Budgets = Budgets()
    loop: Literal["open", "closed"] = "open"
    num_users: int = 1
    duration_s: float | None = None
    slo: Slo | None = None


class Progress(msgspec.Struct):
    """How far a run, or one process's share of it, has come."""

    num_planned: int = 0
    num_sent: int = 0
    num_in_flight: int = 0
    num_tokens: int = 0
    num_missed: int = 0
    outcomes: dict[str, int] = {}
    ttfts_s: list[float] = []
    """Since the last report."""


class Tally:
    """Counts while it runs."""

    def __init__(self, num_planned: int) -> None:
        self.progress = Progress(num_planned)
        self._outcomes: Counter[str] = Counter()
        self._area = 0.0
        self._since = 0.0

    def begin(self, now: float) -> None:
        self._since = now

    def count(self, change: int, now: float) -> None:
        """One more or one less in flight."""
        self._area += self.progress.num_in_flight * (now - self._since)
        self._since = now
        self.progress.num_in_flight += change
        self.progress.num_sent += change > 0

    def mean_in_flight(self, span_s: float) -> float:
        return self._area / span_s if span_s > 0 else 0.0

    def keep(self, record: RequestRecord, slo: Slo) -> None:
        """A request has ended."""
        progress = self.progress
        self._outcomes[record.outcome] += 1
        progress.num_tokens += record.num_output_tokens
        if record.token_times_s:
            progress.ttfts_s.append(record.token_times_s[0] - record.intended_s)
        if record.outcome != CANCELLED and not slo.of(record.kind).met(record):
            progress.num_missed += 1

    def report(self) -> Progress:
        """As it stands; the next one's TTFTs are those from here on."""
        report = msgspec.structs.replace(self.progress, outcomes=dict(self._outcomes))
        self.progress.ttfts_s = []
        return report


class Bodies:
    """The first request of every session, written down before the start."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - see close
        self._places: dict[int, tuple[int, int]] = {}
        self._end = 0

    def add(self, index: int, body: bytes) -> None:
        self._file.write(body)
        self._places[index] = self._end, len(body)
        self._end += len(body)

    def get(self, index: int) -> bytes:
        start, size = self._places[index]
        self._file.seek(start)
        return self._file.read(size)

    def close(self) -> None:
        self._file.close()


class Driver:
    """Runs a ``Load`` once."""

    def __init__(self, load: Load) -> None:
        target = load.target
        headers = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
        self.tally = Tally(len(load.schedule.requests))
        self.records: list[RequestRecord] = []
        self._load = load
        self._client = Client(Address.parse(target.url), load.budgets, headers)
        self._sessions = load.schedule.sessions
        self._bodies = Bodies()
        self._conversations: dict[str, Conversation] = {}
        self._start_at = 0.0
        self._pacer: Pacer | None = None
        self._num_left = len(self._sessions)
        self._planned = {planned.index for planned in load.schedule.requests}
        self._over: asyncio.Future[None] | None = None
        self._is_stopped = False
        self._cpu: list[tuple[float, float]] = []
        self._loop_lags_s: list[float] = []

    def prepare(self) -> None:
        """Everything that would cost time later."""
        for turns in self._sessions:
            first = turns[0]
            schedule = self._load.schedule
            wording = schedule.seed if schedule.wording is None else schedule.wording
            conversation = Conversation(self._load.target.dialect, wording)
            self._bodies.add(first.index, conversation.ask(first.what, first.session))
            if len(turns) > 1:
                self._conversations[first.session] = conversation

    async def run(self, start_at: float) -> Audit:
        """All of it, from ``start_at`` on; returns when the last request has ended."""
        await self._client.resolve()
        self._pacer = Pacer()
        self._over = asyncio.get_running_loop().create_future()
        self._start_at = start_at
        self.tally.begin(start_at)
        try:
            async with asyncio.TaskGroup() as group:
                watches = [group.create_task(w) for w in (self._watch_cpu(), self._watch_loop())]
                self._schedule_all(group)
                await self._over
                for watch in watches:
                    watch.cancel()
        finally:
            self._pacer.close()
            self._client.close()
            self._bodies.close()
        self._sample_cpu()
        self._keep_unsent()
        return self._audit()

    def stop(self) -> None:
        """Send nothing more, and end what is in flight."""
        if self._is_stopped or self._over is None or self._over.done():
            return
        self._is_stopped = True
        self._client.close()
        if self._pacer is not None:
            self._pacer.flush()  # whoever waits for an instant sees that we have stopped

    def _schedule_all(self, group: asyncio.TaskGroup) -> None:
        assert self._pacer is not None
        if self._load.loop == "closed":
            waiting = iter(self._sessions)
            for _ in range(min(self._load.num_users, len(self._sessions))):
                group.create_task(self._user(waiting))
            return

        def begin(turns: list[Planned], at: float) -> None:
            group.create_task(self._session(turns, at))

        for turns in self._sessions:
            at = self._start_at + turns[0].at_s
            self._pacer.at(at, partial(begin, turns, at))

    async def _user(self, waiting: Iterator[list[Planned]]) -> None:
        assert self._pacer is not None
        await self._pacer.until(self._start_at)
        for turns in waiting:
            now = time.monotonic()
            if self._load.duration_s is not None and now - self._start_at > self._load.duration_s:
                self._planned -= {planned.index for planned in turns}
                self._end_session()
            else:
                await self._session(turns, now)

    async def _session(self, turns: list[Planned], intended_at: float) -> None:
        """Every turn, until one fails."""
        assert self._pacer is not None
        body = self._bodies.get(turns[0].index)
        conversation = self._conversations.pop(turns[0].session, None)
        for number, planned in enumerate(turns):
            is_last = number == len(turns) - 1
            reply = Reply(keeps_answer=not is_last)
            if not self._is_stopped:
                await self._request(planned, intended_at, body, reply)
            if is_last or conversation is None or self._is_stopped:
                break
            if reply.outcome != OK or reply.finished_at is None:
                break
            following = turns[number + 1]
            name = f"{planned.session}.{planned.turn}"
            num_tokens = reply.num_output_tokens or sum(reply.counts)
            conversation.answer(reply.token_ids, "".join(reply.texts), num_tokens, name)
            body = conversation.ask(following.what, following.session)
            intended_at = reply.finished_at + following.what.think_s
            await self._pacer.until(intended_at)
        self._end_session()

    def _end_session(self) -> None:
        self._num_left -= 1
        if not self._num_left and self._over is not None and not self._over.done():
            self._over.set_result(None)

    async def _request(
        self, planned: Planned, intended_at: float, body: bytes, reply: Reply
    ) -> None:
        dialect = self._load.target.dialect
        reply.request_id = f"{self._load.run_id}-{planned.index}"
        more = {"x-request-id": reply.request_id, "x-session-id": planned.session}
        payload = self._client.head(dialect.api.path, len(body), more) + body
        sent_at = time.monotonic()
        self.tally.count(1, sent_at)
        cancel_at = None if planned.cancel_after_s is None else sent_at + planned.cancel_after_s
        await self._client.send(payload, reply, cancel_at)
        reply.settle_counts(planned.what.max_tokens if dialect.extensions else None)
        self.tally.count(-1, reply.finished_at or time.monotonic())
        self._keep(self._record(planned, intended_at, sent_at, reply))

    def _record(
        self, planned: Planned, intended_at: float, sent_at: float, reply: Reply
    ) -> RequestRecord:
        def since_start(at: float) -> float:
            return round(at - self._start_at, 7)

        num_known = sum(segment.num_tokens for segment in planned.what.segments)
        is_known = self._load.target.dialect.api is Api.TOKENS and not planned.what.keeps_history
        num_seen, num_told = sum(reply.counts), reply.num_output_tokens or 0
        return RequestRecord(
            target=self._load.target.name,
            index=planned.index,
            session=planned.session,
            turn=planned.turn,
            kind=planned.what.kind,
            intended_s=since_start(intended_at),
            sent_s=since_start(sent_at),
            headers_s=None if reply.headers_at is None else since_start(reply.headers_at),
            token_times_s=tuple(map(since_start, reply.times)),
            token_counts=tuple(reply.counts),
            finished_s=None if reply.finished_at is None else since_start(reply.finished_at),
            num_prompt_tokens=reply.num_prompt_tokens or (num_known if is_known else 0),
            num_output_tokens=num_seen if reply.num_output_tokens is None else num_told,
            num_cached_tokens=reply.num_cached_tokens,
            max_tokens=planned.what.max_tokens,
            outcome=reply.outcome,
            status=reply.status,
            error_code=reply.error_code,
            finish_reason=reply.finish_reason,
            request_id=reply.request_id,
            path=reply.path,
        )

    def _keep(self, record: RequestRecord) -> None:
        self.records.append(record)
        self.tally.keep(record, self._load.slo or Slo({}))

    def _keep_unsent(self) -> None:
        """A record of every request that should have been and was not."""
        missing = self._planned - {record.index for record in self.records}
        reason = "run_stopped" if self._is_stopped else "turn_before_failed"
        for planned in self._load.schedule.requests:
            if planned.index in missing:
                self._keep(
                    RequestRecord(
                        self._load.target.name,
                        planned.index,
                        planned.session,
                        planned.turn,
                        planned.what.kind,
                        planned.at_s,
                        planned.at_s,
                        max_tokens=planned.what.max_tokens,
                        error_code=reason,
                    )
                )

    async def _watch_cpu(self) -> None:
        while True:
            self._sample_cpu()
            await asyncio.sleep(CPU_WINDOW_S / 10)

    async def _watch_loop(self) -> None:
        """Whoever wakes up late for this has been late for tokens too."""
        assert self._pacer is not None
        while not self._is_stopped:
            due = time.monotonic() + _TICK_S
            await self._pacer.until(due)
            self._loop_lags_s.append(time.monotonic() - due)

    def _sample_cpu(self) -> None:
        self._cpu.append((time.monotonic(), time.process_time()))

    def _audit(self) -> Audit:
        ends = [record.finished_s for record in self.records if record.finished_s is not None]
        span_s = max(ends, default=0.0)
        return Audit(
            span_s=span_s,
            cpu_share=largest_share(self._cpu, CPU_WINDOW_S),
            loop_lag_s=percentile(sorted(self._loop_lags_s), 0.99) if self._loop_lags_s else 0.0,
            mean_in_flight=self.tally.mean_in_flight(span_s),
            num_connections=self._client.num_connections,
            is_stopped=self._is_stopped,
        )
