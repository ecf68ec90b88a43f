"""The loop of a leader's process, over a real plan channel with followers on threads."""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import zmq

from engine.plan_channel import FollowerChannel, LeaderChannel
from engine.process import RankProcess
from engine.rank_config import RankConfig
from engine.transfer_thread import TransferThread
from kvtransfer.events import (
    Command,
    ControlReceived,
    Event,
    Load,
    PoolsChanged,
    ReportStatus,
    SendControl,
    ThreadDied,
)
from kvtransfer.identity import RankIdentity
from protocol.errors import PeerError
from protocol.messages import GangReady, Shutdown
from protocol.plans import PrefillPlan, StepResult, Stop
from protocol.sockets import open_context

BUDGET_S = 20.0


class Thread:
    """What a leader's process sees of its transfer thread."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.commands: list[Command] = []

    def submit(self, command: Command) -> None:
        self.commands.append(command)


class Node:
    """Plans so many steps, then has its own transfer thread end."""

    def __init__(self, thread: Thread, num_steps: int) -> None:
        self.thread = thread
        self.plans = deque(PrefillPlan(step, ()) for step in range(1, num_steps + 1))
        self.seen: list[Event] = []
        self.results: list[list[int]] = []
        self.commands: list[Command] = []

    def on_event(self, event: Event, now: float) -> None:
        self.seen.append(event)
        self.commands.append(SendControl(GangReady(now)))

    def schedule(self, now: float) -> PrefillPlan | None:
        self.commands.append(SendControl(GangReady(now)))
        if self.plans:
            return self.plans.popleft()
        self.thread.events.put(ThreadDied("asked", clean=True))
        return None

    def update(self, plan: PrefillPlan, results: Sequence[StepResult], now: float) -> None:
        assert all(result.step == plan.step for result in results) and now > 0
        self.results.append([result.rank for result in results])

    def take_commands(self) -> list[Command]:
        commands, self.commands = self.commands, []
        return commands

    def load(self) -> Load:
        return Load(num_waiting=len(self.plans), counters={"own": 1.0})

    is_idle = True

    def check(self) -> None:
        """It has no blocks."""


class Gang:
    """A leader's process and its followers."""

    def __init__(
        self, leader: LeaderChannel, context: zmq.Context[zmq.Socket[bytes]], world_size: int
    ) -> None:
        config = RankConfig(
            model="m", pool_id="p", control_address="", token="t", listen="ipc:///x",
            cp_size=world_size, step_timeout_s=0.5,
        )  # fmt: skip
        identity = RankIdentity("prefill", "p", 0, world_size, 1, "i")
        self.thread = Thread()
        self.process = RankProcess(config, identity, cast(TransferThread, self.thread), context)
        self.process.leader = leader

    def lead(self, node: Node, **options: Any) -> None:
        self.process.lead(node, lambda plan: StepResult(plan.step, 0), **options)

    @property
    def reports(self) -> list[ReportStatus]:
        return [c for c in self.thread.commands if isinstance(c, ReportStatus)]


MakeGang = Callable[..., Gang]


@pytest.fixture
def make_gang(tmp_path: Path) -> Iterator[MakeGang]:
    with open_context("secret") as context, contextlib.ExitStack() as stack:

        def make(world_size: int = 1, *, silent: int | None = None) -> Gang:
            leader = LeaderChannel(context, f"ipc://{tmp_path}/g", world_size=world_size)
            stack.callback(leader.close)
            for rank in range(1, world_size):
                channel = FollowerChannel(
                    context, leader.address, rank=rank, routing_id=f"p/{rank}"
                )
                stack.callback(channel.close)
                thread = threading.Thread(target=_follow, args=(channel, rank, rank == silent))
                thread.start()
                stack.callback(thread.join, BUDGET_S)
            leader.wait_joined(BUDGET_S)
            stack.callback(leader.broadcast, Stop())
            return Gang(leader, context, world_size)

        yield make


def _follow(channel: FollowerChannel, rank: int, is_silent: bool) -> None:
    while not isinstance(plan := channel.receive(BUDGET_S), Stop):
        if plan is not None and not is_silent:
            channel.reply(StepResult(plan.step, rank))


def test_a_leader_that_needs_its_followers_is_told_what_each_has_brought(
    make_gang: MakeGang,
) -> None:
    gang = make_gang(3)
    node = Node(gang.thread, 2)
    with pytest.raises(SystemExit):
        gang.lead(node)
    assert node.results == [[0, 1, 2]] * 2


def test_a_leader_that_does_not_need_them_is_told_its_own_result_alone(
    make_gang: MakeGang,
) -> None:
    gang = make_gang(3)
    node = Node(gang.thread, 2)
    with pytest.raises(SystemExit):
        gang.lead(node, needs_followers=False)
    assert node.results == [[0]] * 2


@pytest.mark.parametrize(("needs_followers", "num_updated"), [(True, 0), (False, 1)])
def test_who_hangs_breaks_the_gang_one_step_later_at_most(
    make_gang: MakeGang, needs_followers: bool, num_updated: int
) -> None:
    gang = make_gang(3, silent=2)
    node = Node(gang.thread, 5)
    with pytest.raises(PeerError, match=r"ranks \[2\] have not answered step 1"):
        gang.lead(node, needs_followers=needs_followers)
    assert len(node.results) == num_updated


def test_commands_are_passed_on_in_order_after_events_and_steps(make_gang: MakeGang) -> None:
    gang = make_gang()
    node = Node(gang.thread, 1)
    events: list[Event] = [ControlReceived(Shutdown("x")), PoolsChanged(())]
    for event in events:
        gang.thread.events.put(event)
    taken: list[Command] = []
    with pytest.raises(SystemExit):
        gang.lead(node, submit=taken.append)
    assert node.seen == events
    said = [command.message for command in taken if isinstance(command, SendControl)]
    times = [message.tokens_per_s for message in said if isinstance(message, GangReady)]
    assert len(times) == 4 and times == sorted(times)


def test_heartbeats_say_what_node_and_process_have_counted(make_gang: MakeGang) -> None:
    gang = make_gang()
    node = Node(gang.thread, 2)
    with pytest.raises(SystemExit):
        gang.lead(node, counters={"more": 2.0})
    assert [report.num_steps for report in gang.reports] == [0, 1, 1, 2, 2]
    assert [report.step_started is None for report in gang.reports] == [
        False, True, False, True, True,
    ]  # fmt: skip
    assert gang.reports[-1].load == Load(counters={"own": 1.0, "more": 2.0})
