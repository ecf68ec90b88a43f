"""The main loop of a rank: it forms the gang, and then leads or follows its steps.

1. ``form_gang`` takes the rank from HELLO to a gang whose collectives and plan channel work.
2. The leader stays in ``lead``: take in events, schedule, have every rank execute the plan, update,
   and pass on what follows from it. With nothing to do it blocks until an event comes.
3. A follower stays in ``follow``, and executes the leader's plans.
"""

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

import torch
import zmq

from engine.leader_node import LeaderNode, P
from engine.plan_channel import CHECK_INTERVAL_S, FollowerChannel, LeaderChannel
from engine.rank_config import RankConfig
from engine.transfer_thread import TransferThread
from kvtransfer.events import (
    Command,
    Event,
    Load,
    ReportStatus,
    SendControl,
    ThreadDied,
    Welcomed,
)
from kvtransfer.identity import RankIdentity
from modeling.parallel import init_gang
from protocol.errors import PeerError
from protocol.messages import ToCoordinator, Welcome
from protocol.plans import Plan, StepResult, Stop
from protocol.process.crash_points import exit_here
from protocol.process.failpoints import EXIT, HANG, STEP, Failpoints

IDLE_WAIT_S = 1.0

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
        self._uncollected: int | None = None  # the step whose results are still to come
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
        """Notice the thread's end, and raise as ``drain``. All other events are kept for it."""
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

    def lead(
        self,
        node: LeaderNode[P],
        execute: Callable[[P], StepResult],
        *,
        needs_followers: bool = True,
        submit: Callable[[Command], None] | None = None,
        counters: Mapping[str, float] | None = None,
    ) -> NoReturn:
        """Leader: serve until the process ends; never returns but by an exception.

        Args:
            node: makes the decisions.
            execute: executes this rank's part of a plan.
            needs_followers: whether ``node`` needs the followers' results. If it does not, the
                leader collects them before the next step instead: a step's last collective has
                shown that the followers are past every use of KV, and so they lag by a step at
                most.
            submit: where commands go; by default to the transfer thread.
            counters: for the heartbeat, beside those of ``node``; read after each step.

        Raises:
            PeerError: a follower is gone or silent, or the transfer thread has died.
            SystemExit: the process is to end.
        """

        def pass_on() -> None:
            for command in node.take_commands():
                (submit or self.submit)(command)

        def load() -> Load:
            own = node.load()
            return dataclasses.replace(own, counters={**own.counters, **(counters or {})})

        wait_s = 0.0
        while True:
            for event in self.drain(wait_s):
                node.on_event(event, time.monotonic())
            plan = node.schedule(time.monotonic())
            pass_on()
            if plan is None:
                wait_s = IDLE_WAIT_S
                self._report(load())
                continue
            wait_s = 0.0
            self._begin_step()
            results = self._step(plan, execute, needs_followers=needs_followers)
            node.update(plan, results, time.monotonic())
            pass_on()
            self._end_step(load())

    def _step(
        self, plan: P, execute: Callable[[P], StepResult], *, needs_followers: bool
    ) -> list[StepResult]:
        """Have every rank execute a plan; the results by rank, the own one first."""
        assert self.leader is not None, "only the leader steps"
        self._collect()
        self.leader.broadcast(plan)
        self._uncollected = plan.step
        own = execute(plan)
        return [own, *self._collect()] if needs_followers else [own]

    def _collect(self) -> list[StepResult]:
        """The followers' results of the last step, unless they were collected before."""
        step = self._uncollected
        self._uncollected = None
        if step is None:
            return []
        assert self.leader is not None, "only the leader steps"
        return self.leader.collect(step, self._config.step_timeout_s, self.check)

    def follow(self, execute: Callable[[Plan], StepResult]) -> NoReturn:
        """Follower: execute plans until the leader stops; never returns but by an exception."""
        assert self.follower is not None, "only a follower follows"
        while True:
            plan = self.follower.receive(CHECK_INTERVAL_S)
            self.check()
            self._events.clear()  # only the leader acts on events
            if isinstance(plan, Stop):
                raise SystemExit(0)
            if plan is not None:
                self._begin_step()
                self.follower.reply(execute(plan))
                self._end_step(Load())

    def _begin_step(self) -> None:
        """From now on heartbeats report how long this step has been running."""
        self.submit(dataclasses.replace(self._status, step_started=time.monotonic()))
        if self._failpoints:
            self._fail_step()

    def _fail_step(self) -> None:
        """Carry out the failpoint of this step, if any; the transfer thread goes on meanwhile."""
        fault = self._failpoints.reach(STEP)
        if fault is None:
            return
        if fault.action == EXIT:
            exit_here(STEP)
        status = self._status_with(self._status.load)
        self.submit(dataclasses.replace(status, step_started=time.monotonic()))
        threading.Event().wait(None if fault.action == HANG else fault.seconds)

    def _end_step(self, load: Load) -> None:
        """From now on heartbeats report one more step, and the load after it."""
        self._num_steps += 1
        self._report(load)

    def _report(self, load: Load) -> None:
        """Set the content of the next heartbeats, between steps."""
        self._status = self._status_with(load)
        self.submit(self._status)

    def _status_with(self, load: Load) -> ReportStatus:
        hits = {name: float(count) for name, count in self._failpoints.hits.items()}
        load = dataclasses.replace(load, counters={**load.counters, **hits})
        return ReportStatus(num_steps=self._num_steps, step_started=None, load=load)


def _backend(device: torch.device, world_size: int) -> str:
    """NCCL refuses two ranks on one GPU; gloo then carries what they exchange."""
    return "nccl" if device.type == "cuda" and torch.cuda.device_count() >= world_size else "gloo"
