"""The channel between a pool's leader and its followers, over real sockets."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from engine.plan_channel import FollowerChannel, LeaderChannel
from protocol.errors import PeerError
from protocol.plans import PrefillPlan, StepResult, Stop
from protocol.sockets import open_context

BUDGET_S = 20.0


class Gang:
    """Opens channels of one gang, and closes them."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], address: str, stack: contextlib.ExitStack
    ) -> None:
        self._context = context
        self._address = address
        self._stack = stack

    def lead(self, world_size: int) -> LeaderChannel:
        leader = LeaderChannel(self._context, self._address, world_size=world_size)
        self._stack.callback(leader.close)
        self._address = leader.address
        return leader

    def follow(self, rank: int, **other: str) -> FollowerChannel:
        fields = {"routing_id": f"p/{rank}"} | other
        channel = FollowerChannel(self._context, self._address, rank=rank, **fields)
        self._stack.callback(channel.close)
        return channel


@pytest.fixture(params=["ipc", "tcp"])
def gang(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Gang]:
    address = f"ipc://{tmp_path}/gang" if request.param == "ipc" else "tcp://127.0.0.1:*"
    with open_context("secret") as context, contextlib.ExitStack() as stack:
        yield Gang(context, address, stack)


def answer(channel: FollowerChannel, rank: int) -> None:
    """A follower's loop, until the leader stops it."""
    while not isinstance(plan := channel.receive(BUDGET_S), Stop):
        assert plan is not None
        channel.reply(StepResult(plan.step, rank, compute_s=float(rank)))


def test_every_follower_gets_every_plan_and_is_heard(gang: Gang) -> None:
    leader = gang.lead(4)
    threads = []
    for rank in (3, 1, 2):
        channel = gang.follow(rank)
        threads.append(threading.Thread(target=answer, args=(channel, rank)))
        threads[-1].start()
    leader.wait_joined(BUDGET_S)
    for step in range(1, 4):
        leader.broadcast(PrefillPlan(step, ()))
        results = leader.collect(step, BUDGET_S)
        assert [(result.step, result.rank) for result in results] == [(step, r) for r in (1, 2, 3)]
    leader.broadcast(Stop())
    for thread in threads:
        thread.join(BUDGET_S)
        assert not thread.is_alive()


def test_a_pool_of_one_waits_for_nobody(gang: Gang) -> None:
    leader = gang.lead(1)
    leader.wait_joined(0.0)
    leader.broadcast(Stop())
    assert leader.collect(1, 0.0) == []


def test_a_silent_follower_breaks_the_gang(gang: Gang) -> None:
    leader = gang.lead(3)
    channels = [gang.follow(rank) for rank in (1, 2)]
    leader.wait_joined(BUDGET_S)
    leader.broadcast(PrefillPlan(5, ()))
    assert isinstance(channels[0].receive(BUDGET_S), PrefillPlan)
    channels[0].reply(StepResult(5, 1))
    with pytest.raises(PeerError, match=r"ranks \[2\] have not answered step 5"):
        leader.collect(5, 0.05)
    channels[1].reply(StepResult(4, 2))  # of another step: does not count
    with pytest.raises(PeerError, match="step 5"):
        leader.collect(5, 0.05)


def test_who_does_not_know_the_token_is_nobody(gang: Gang) -> None:
    leader = gang.lead(2)
    with open_context("guess") as strange:
        stranger = FollowerChannel(strange, leader.address, rank=1, routing_id="stranger")
        with pytest.raises(PeerError, match=r"ranks \[1\] have not joined"):
            leader.wait_joined(0.5)
        friend = gang.follow(1)
        leader.wait_joined(BUDGET_S)
        leader.broadcast(PrefillPlan(1, ()))
        assert stranger.receive(0.05) is None
        stranger.reply(StepResult(1, 1))
        assert friend.receive(BUDGET_S) == PrefillPlan(1, ())
        with pytest.raises(PeerError):
            leader.collect(1, 0.1)
        stranger.close()


def test_two_processes_are_not_one_rank(gang: Gang) -> None:
    leader = gang.lead(2)
    gang.follow(1)
    leader.wait_joined(BUDGET_S)
    gang.follow(1, routing_id="p/1/again")
    with pytest.raises(PeerError, match="second process joined"):
        leader.collect(1, BUDGET_S)


def test_waiting_keeps_an_eye_on_something_else(gang: Gang) -> None:
    leader = gang.lead(2)
    gang.follow(1)
    leader.wait_joined(BUDGET_S)
    leader.broadcast(PrefillPlan(1, ()))

    def check() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        leader.collect(1, BUDGET_S, check)
