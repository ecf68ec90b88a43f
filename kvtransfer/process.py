"""A rank while it lives: its configuration, its gang, its transfer thread, the steps it takes.

1. ``form_gang`` takes the rank from HELLO to a gang whose collectives and plan channel work.
2. Each step the leader calls ``step``: broadcast, execute the own part, collect everyone's result.
   A follower stays in ``follow``.
3. Between steps the leader calls ``drain``; while it waits for its followers, ``check`` keeps an
   eye on the transfer thread.
"""

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable

import msgspec
import torch
import zmq

from kvtransfer.events import (
    Command,
    Event,
    ReportStatus,
    SendControl,
    ThreadDied,
    Welcomed,
)
from kvtransfer.identity import RankIdentity
from kvtransfer.rank_config import RankConfig
from kvtransfer.thread import TransferThread
from modeling.parallel import init_gang
from protocol.errors import PeerError
from protocol.failpoints import EXIT, HANG, STEP, Failpoints
from protocol.gang import CHECK_INTERVAL_S, FollowerChannel, LeaderChannel
from protocol.messages import BlockCounts, ToCoordinator, Welcome
from protocol.places import exit_here
from protocol.plans import Plan, StepResult, Stop

_log = logging.getLogger(__name__)


class RankProcess:
    """One rank, from its HELLO on. For the main thread."""

    def __init__(
        self,
        config: RankConfig,
        identity: RankIdentity,
        thread: TransferThread,
        context: zmq.Context[zmq.Socket[bytes]],
    ) -> None:
        self.identity = identity
        self.thread = thread
        self.pool_epoch = 0  # known once the gang has formed
        self.leader: LeaderChannel | None = None
        self.follower: FollowerChannel | None = None
        self.store_fd = -1
        self._config = config
        self._context = context
        self._num_steps = 0
        self._status = ReportStatus(num_steps=0, step_started=None)
        self._events: list[Event] = []  # seen by check, not yet drained
        self._failpoints = Failpoints(config.failpoints)

    # -- boot --------------------------------------------------------------------------------------

    def form_gang(self, device: torch.device) -> int:
        """Wait for the coordinator's WELCOME, then for the whole gang.

        Returns:
            Blocks of KV that every rank of the gang has.

        Raises:
            PeerError: the gang has not formed in time, or the coordinator refused this rank.
        """
        config = self._config
        deadline = time.monotonic() + config.start_timeout_s
        welcome = self._wait_welcomed(deadline)
        self.pool_epoch = welcome.pool_epoch
        if config.world_size > 1:
            init_gang(
                welcome.gang.store,
                config.rank,
                config.world_size,
                _backend(device, config.world_size),
                max(1.0, deadline - time.monotonic()),
                self.store_fd,
            )
        if self.leader is not None:
            self.leader.wait_joined(max(1.0, deadline - time.monotonic()), self.check)
        else:
            self.follower = FollowerChannel(
                self._context,
                welcome.gang.plan,
                rank=config.rank,
                routing_id=self.identity.routing_id,
            )
        _log.info("gang of %d formed, epoch %d", config.world_size, welcome.pool_epoch)
        return welcome.num_blocks

    def _wait_welcomed(self, deadline: float) -> Welcome:
        while (left_s := deadline - time.monotonic()) > 0:
            for event in self._receive(left_s):
                if isinstance(event, Welcomed):
                    return event.welcome
                self._events.append(event)
        raise PeerError(
            f"no WELCOME within {self._config.start_timeout_s:.0f} s: is a rank missing?"
        )

    # -- the transfer thread -----------------------------------------------------------------------

    def submit(self, command: Command) -> None:
        self.thread.submit(command)

    def tell(self, message: ToCoordinator) -> None:
        """Send ``message`` to the coordinator."""
        self.thread.submit(SendControl(message))

    def drain(self, timeout_s: float = 0.0) -> list[Event]:
        """Every event so far; blocks up to ``timeout_s`` for the first when there is none.

        Raises:
            SystemExit: the thread has ended on request, and so must the process.
            PeerError: the thread has died.
        """
        events = [*self._events, *self._receive(0.0 if self._events else timeout_s)]
        self._events.clear()
        return events

    def check(self) -> None:
        """Notice the thread's end, keep all other events for the next ``drain``; raises as it."""
        self._events.extend(self._receive(0.0))

    def _receive(self, timeout_s: float) -> list[Event]:
        events: list[Event] = []
        try:
            events.append(self.thread.events.get(timeout_s > 0, timeout_s or None))
            while True:
                events.append(self.thread.events.get(False))
        except queue.Empty:
            pass
        for event in events:
            if isinstance(event, ThreadDied):
                if event.clean:
                    _log.info("stopping: %s", event.reason)
                    raise SystemExit(0)
                raise PeerError(f"the transfer thread has ended: {event.reason}")
        return events

    # -- steps -------------------------------------------------------------------------------------

    def step(self, step: int, plan: Plan, execute: Callable[[], StepResult]) -> list[StepResult]:
        """Leader: have every rank execute ``plan``; the results by rank, the own one first.

        Raises:
            PeerError: a follower is gone or silent.
        """
        assert self.leader is not None, "only the leader steps"
        self.leader.broadcast(plan)
        own = execute()
        return [own, *self.leader.collect(step, self._config.step_timeout_s, self.check)]

    def follow(self, execute: Callable[[Plan], StepResult]) -> None:
        """Follower: execute plans until the leader stops; never returns but by an exception."""
        assert self.follower is not None, "only a follower follows"
        while True:
            plan = self.follower.receive(CHECK_INTERVAL_S)
            self.check()
            self._events.clear()  # a follower's events concern nobody
            if isinstance(plan, Stop):
                raise SystemExit(0)
            if plan is not None:
                self.begin_step()
                self.follower.reply(execute(plan))
                self.end_step()

    def begin_step(self) -> None:
        """Heartbeats say from now on how long this step has been running."""
        self.submit(dataclasses.replace(self._status, step_started=time.monotonic()))
        if self._failpoints:
            self._fail_step()

    def _fail_step(self) -> None:
        """Do what a failpoint says of this step; the transfer thread goes on meanwhile."""
        fault = self._failpoints.reach(STEP)
        if fault is None:
            return
        if fault.action == EXIT:
            exit_here(STEP)
        self._status = dataclasses.replace(self._status, counters=self._with_hits(()))
        self.submit(dataclasses.replace(self._status, step_started=time.monotonic()))
        threading.Event().wait(None if fault.action == HANG else fault.seconds)

    def _with_hits(self, counters: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
        hits = self._failpoints.hits.items()
        return (*counters, *((name, float(count)) for name, count in hits))

    def end_step(
        self,
        *,
        num_waiting: int = 0,
        num_running: int = 0,
        pending_tokens: int = 0,
        blocks: tuple[BlockCounts, ...] = (),
        counters: tuple[tuple[str, float], ...] = (),
    ) -> None:
        """Heartbeats say from now on that another step is done, and what it left."""
        self._num_steps += 1
        self.report(
            num_waiting=num_waiting,
            num_running=num_running,
            pending_tokens=pending_tokens,
            blocks=blocks,
            counters=counters,
        )

    def report(
        self,
        *,
        num_waiting: int = 0,
        num_running: int = 0,
        pending_tokens: int = 0,
        blocks: tuple[BlockCounts, ...] = (),
        counters: tuple[tuple[str, float], ...] = (),
    ) -> None:
        """What the next heartbeats say, between steps."""
        self._status = ReportStatus(
            num_steps=self._num_steps,
            step_started=None,
            num_waiting=num_waiting,
            num_running=num_running,
            pending_tokens=pending_tokens,
            blocks=tuple(msgspec.structs.astuple(counts) for counts in blocks),
            counters=self._with_hits(counters),
        )
        self.submit(self._status)


def _backend(device: torch.device, world_size: int) -> str:
    """NCCL refuses two ranks on one GPU; gloo then carries what they exchange."""
    return "nccl" if device.type == "cuda" and torch.cuda.device_count() >= world_size else "gloo"
